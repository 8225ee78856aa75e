package kube

// One member after the other restarts, over and over, under an apiserver that works on three endpoints.

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
)

const (
	rollingNamespace = "rolling"
	// rounds is how often every member restarts, at least.
	rounds = 2
	// quick is the pause between two restarts that most steps meet.
	quick = 2 * time.Second
	// slow is longer than any lease of these steps: a new leader gives every lease its whole time
	// again, as in etcd, so that under quick restarts none would ever end.
	slow = 20 * time.Second
)

// Every step must succeed at its first call although members come and go, beside writers that do
// nothing else and controllers that hold their leases with the defaults of Kubernetes.
func TestKubeRollingRestart(t *testing.T) {
	w := newWorld(t, 3)
	_, err := w.clients.CoreV1().Namespaces().Create(background(), namespaceNamed(rollingNamespace), metav1.CreateOptions{})
	must(t, err, "create the namespace of the writers")
	f := follow(w, rollingNamespace)
	defer close(f.stop)

	ctx, cancel := context.WithCancel(background())
	defer cancel()
	writers := write(ctx, t, w)
	controllers := control(ctx, t, w)
	rolling := roll(ctx, w)
	runSteps(t, w, []step{
		{"StrangersAreRefused", strangersAreRefused},
		{"Namespaces", namespaces},
		{"TwoThousandConfigMaps", twoThousandConfigMaps},
		{"PagedList", pagedList},
		{"ConsistentReadsFromCache", consistentReadsFromCache},
		{"WatchAndResume", watchAndResume},
		{"WatchListAndBookmarks", watchListAndBookmarks},
		{"UpdateConflicts", updateConflicts},
		{"Preconditions", preconditions},
		{"LargeObjects", largeObjects},
		{"CustomResources", customResources},
		{"Finalizers", finalizers},
		{"CompactionAndGone", compactionAndGone},
		{"TwoAPIServers", twoAPIServers},
		{"DeleteCollection", deleteCollection},
	})
	rolling.pause.Store(int64(slow))
	runSteps(t, w, []step{
		{"MasterLease", masterLease},
		{"EventsExpire", eventsExpire},
	})
	restarts, err := rolling.finish()
	must(t, err, "restart members")
	cancel()
	controllers.Wait()
	acknowledged := writers()
	f.waitEqual(t, w, rollingNamespace)
	list, err := w.clients.CoreV1().ConfigMaps(rollingNamespace).List(background(), metav1.ListOptions{})
	must(t, err, "list what the writers made")
	present := map[string]string{}
	for _, item := range list.Items {
		present[item.Name] = item.ResourceVersion
	}
	for name, version := range acknowledged {
		if present[name] != version {
			t.Fatalf("%s was acknowledged at %s and is now at %q", name, version, present[name])
		}
	}
	t.Logf("%d restarts, %d creates beside the steps", restarts, len(acknowledged))
}

// roller restarts members until it is told to finish.
type roller struct {
	pause  atomic.Int64
	enough chan struct{}
	done   chan struct{}
	count  int
	err    error
}

func roll(ctx context.Context, w *world) *roller {
	r := &roller{enough: make(chan struct{}), done: make(chan struct{})}
	r.pause.Store(int64(quick))
	go func() {
		defer close(r.done)
		for {
			for _, m := range w.members {
				if r.err = restart(ctx, w, m); r.err != nil {
					return
				}
				r.count++
				select {
				case <-time.After(time.Duration(r.pause.Load())):
				case <-r.enough:
					if r.count >= rounds*len(w.members) {
						return
					}
				case <-ctx.Done():
					return
				}
			}
		}
	}()
	return r
}

// finish ends it after enough restarts and returns how many restarts there were.
func (r *roller) finish() (int, error) {
	close(r.enough)
	<-r.done
	return r.count, r.err
}

// restart returns once the member answers linearizable reads again.
func restart(ctx context.Context, w *world, m *member) error {
	if err := m.process.end(); err != nil {
		return fmt.Errorf("%s: %w", m.name, err)
	}
	if err := w.startMember(m); err != nil {
		return fmt.Errorf("%s: %w", m.name, err)
	}
	deadline := time.Now().Add(patience)
	for {
		attempt, cancel := context.WithTimeout(ctx, 5*time.Second)
		_, err := m.client.Get(attempt, "/registry/health")
		cancel()
		if err == nil {
			return nil
		}
		if !m.process.running() || time.Now().After(deadline) {
			return fmt.Errorf("%s does not come back: %w; its log ends with:\n%s", m.name, err,
				m.process.logTail())
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// write creates objects until the context ends; a call that fails is a failure of the test. The
// function that it returns waits for the writers and gives the version of each object.
func write(ctx context.Context, t *testing.T, w *world) func() map[string]string {
	api := w.clients.CoreV1().ConfigMaps(rollingNamespace)
	acknowledged := map[string]string{}
	var lock sync.Mutex
	var group sync.WaitGroup
	for writer := range 4 {
		group.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				name := fmt.Sprintf("rolling-%d-%05d", writer, i)
				// Not under ctx: the last call is to end, not to be canceled.
				created, err := api.Create(background(), configMap(name, i), metav1.CreateOptions{})
				if err != nil {
					t.Errorf("create %s: %v", name, err)
					return
				}
				lock.Lock()
				acknowledged[name] = created.ResourceVersion
				lock.Unlock()
				time.Sleep(20 * time.Millisecond)
			}
		})
	}
	return func() map[string]string {
		group.Wait()
		return acknowledged
	}
}

// control runs three controllers of two candidates each; who leads first must lead until the end.
func control(ctx context.Context, t *testing.T, w *world) *sync.WaitGroup {
	var group sync.WaitGroup
	for controller := range 3 {
		name := fmt.Sprintf("controller-%d", controller)
		var first sync.Once
		for candidate := range 2 {
			identity := fmt.Sprintf("%s-%d", name, candidate)
			lock := &resourcelock.LeaseLock{
				LeaseMeta:  metav1.ObjectMeta{Name: name, Namespace: "kube-system"},
				Client:     w.clients.CoordinationV1(),
				LockConfig: resourcelock.ResourceLockConfig{Identity: identity},
			}
			elector, err := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
				Lock:          lock,
				LeaseDuration: 15 * time.Second,
				RenewDeadline: 10 * time.Second,
				RetryPeriod:   2 * time.Second,
				Callbacks: leaderelection.LeaderCallbacks{
					OnStartedLeading: func(context.Context) {
						isFirst := false
						first.Do(func() { isFirst = true })
						if !isFirst {
							t.Errorf("%s took the lease of %s", identity, name)
						}
					},
					OnStoppedLeading: func() {
						if ctx.Err() == nil {
							t.Errorf("%s lost its lease", identity)
						}
					},
				},
			})
			must(t, err, "make a controller")
			group.Go(func() { elector.Run(ctx) })
		}
	}
	return &group
}
