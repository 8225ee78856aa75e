package kube

// Compactions, restarts and crashes under a working apiserver.

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
)

// After two rounds of the apiserver's compactor an old revision is gone for lists, for continue
// tokens and for watches, while everything newer still works.
func compactionAndGone(t *testing.T, w *world) {
	api := w.clients.CoreV1().ConfigMaps(bulkNamespace)
	page, err := api.List(background(), metav1.ListOptions{Limit: 500})
	must(t, err, "first page")
	old := page.ResourceVersion
	_, err = api.Create(background(), configMap("after-page", 0), metav1.CreateOptions{})
	must(t, err, "create")
	oldRevision, err := strconv.ParseInt(old, 10, 64)
	must(t, err, "parse the list's version")
	eventually(t, "the store is compacted past the page", func(ctx context.Context) error {
		_, err := w.etcd.Get(ctx, "/registry/health", clientv3.WithRev(oldRevision))
		if err == nil {
			return fmt.Errorf("revision %d can still be read", oldRevision)
		}
		if err.Error() != "etcdserver: mvcc: required revision has been compacted" {
			t.Fatalf("read at an old revision: %v", err)
		}
		return nil
	})
	exact := metav1.ListOptions{
		ResourceVersion: old, ResourceVersionMatch: metav1.ResourceVersionMatchExact,
	}
	eventually(t, "an exact list at the old revision is gone", func(ctx context.Context) error {
		_, err := api.List(ctx, exact)
		return wantGone(err)
	})
	eventually(t, "the continue token is gone", func(ctx context.Context) error {
		_, err := api.List(ctx, metav1.ListOptions{Limit: 500, Continue: page.Continue})
		return wantGone(err)
	})
	_, err = api.List(background(), metav1.ListOptions{Limit: 500, Continue: page.Continue})
	fresh := err.(apierrors.APIStatus).Status().Continue
	if fresh == "" {
		t.Fatal("the 410 carries no new continue token")
	}
	rest, err := api.List(background(), metav1.ListOptions{Continue: fresh})
	must(t, err, "go on with the inconsistent token")
	if want := bulkCount - 500 + 1; len(rest.Items) < want-1 || len(rest.Items) > want {
		t.Fatalf("the rest holds %d objects, want about %d", len(rest.Items), want)
	}
	// Events are not cached by the apiserver, so this watch reaches the store.
	must(t, wantGone(watchFromOne(w.clients.CoreV1().Events("small"))), "watch from revision 1")
	must(t, api.Delete(background(), "after-page", metav1.DeleteOptions{}), "delete")
}

// watchFromOne returns the error that a watch from the first revision ends with.
func watchFromOne(api watchable) error {
	watcher, err := api.Watch(background(), metav1.ListOptions{ResourceVersion: "1"})
	if err != nil {
		return err
	}
	defer watcher.Stop()
	event, open := <-watcher.ResultChan()
	if !open {
		return fmt.Errorf("the watch ended without a word")
	}
	if event.Type != watch.Error {
		return fmt.Errorf("the watch began with %s", event.Type)
	}
	return apierrors.FromObject(event.Object)
}

type watchable interface {
	Watch(context.Context, metav1.ListOptions) (watch.Interface, error)
}

func wantGone(err error) error {
	if apierrors.IsResourceExpired(err) || apierrors.IsGone(err) {
		return nil
	}
	return fmt.Errorf("want 410, got %v", err)
}

// follower is an informer without the machinery: it mirrors the objects of one namespace.
type follower struct {
	store cache.Store
	stop  chan struct{}
}

func follow(w *world, namespace string) *follower {
	f := &follower{store: cache.NewStore(cache.MetaNamespaceKeyFunc), stop: make(chan struct{})}
	source := cache.NewListWatchFromClient(w.clients.CoreV1().RESTClient(), "configmaps", namespace,
		fields.Everything())
	go cache.NewReflector(source, &corev1.ConfigMap{}, f.store, 0).Run(f.stop)
	return f
}

func (f *follower) waitEqual(t *testing.T, w *world, namespace string) {
	t.Helper()
	eventually(t, "the informer agrees with the server", func(ctx context.Context) error {
		list, err := w.clients.CoreV1().ConfigMaps(namespace).List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		if have := len(f.store.List()); have != len(list.Items) {
			return fmt.Errorf("the informer holds %d of %d", have, len(list.Items))
		}
		for _, item := range list.Items {
			held, exists, _ := f.store.GetByKey(namespace + "/" + item.Name)
			if !exists {
				return fmt.Errorf("the informer misses %s", item.Name)
			}
			if version := held.(*corev1.ConfigMap).ResourceVersion; version != item.ResourceVersion {
				return fmt.Errorf("%s is held at %s, is at %s", item.Name, version,
					item.ResourceVersion)
			}
		}
		return nil
	})
}

func apiserverRestart(t *testing.T, w *world) {
	f := follow(w, bulkNamespace)
	defer close(f.stop)
	f.waitEqual(t, w, bulkNamespace)
	api := w.clients.CoreV1().ConfigMaps(bulkNamespace)
	before, err := api.List(background(), metav1.ListOptions{})
	must(t, err, "list before the restart")
	w.apiserver.terminate(t)
	w.startAPIServer(t)
	w.waitAPIServer(t)
	after, err := api.List(background(), metav1.ListOptions{})
	must(t, err, "list after the restart")
	sameItems(t, before, after)
	// The new apiserver's cache begins at its start, so it cannot serve the beginning either.
	must(t, wantGone(watchFromOne(api)), "watch the restarted apiserver from revision 1")
	parallel(t, 8, 100, func(i int) error {
		_, err := api.Patch(background(), bulkName(i), types.MergePatchType,
			[]byte(`{"data":{"restarted":"yes"}}`), metav1.PatchOptions{})
		return err
	})
	f.waitEqual(t, w, bulkNamespace)
	eventually(t, "custom resources are served again", func(ctx context.Context) error {
		list, err := w.dynamic.Resource(widgets).Namespace("small").List(ctx, metav1.ListOptions{})
		if err == nil && len(list.Items) != 50 {
			return fmt.Errorf("%d widgets", len(list.Items))
		}
		return err
	})
}

// The store dies again and again without warning under a working apiserver: nothing acknowledged may
// be missing, revisions must not go back, and watches must carry on.
func storeCrash(t *testing.T, w *world) {
	f := follow(w, "small")
	defer close(f.stop)
	f.waitEqual(t, w, "small")
	api := w.clients.CoreV1().ConfigMaps("small")
	acknowledged := map[string]string{}
	var lock sync.Mutex
	var writers sync.WaitGroup
	ctx, cancel := context.WithCancel(background())
	for writer := range 4 {
		writers.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				name := fmt.Sprintf("crash-%d-%05d", writer, i)
				created, err := api.Create(ctx, configMap(name, i), metav1.CreateOptions{})
				if err == nil {
					lock.Lock()
					acknowledged[name] = created.ResourceVersion
					lock.Unlock()
				}
			}
		})
	}
	// Each crash comes in the middle of writes that were begun after the last recovery.
	for crash := range 3 {
		lock.Lock()
		target := len(acknowledged) + 150
		lock.Unlock()
		eventually(t, fmt.Sprintf("writes before crash %d", crash), func(context.Context) error {
			lock.Lock()
			defer lock.Unlock()
			if have := len(acknowledged); have < target {
				return fmt.Errorf("%d of %d", have, target)
			}
			return nil
		})
		w.members[0].process.kill()
		must(t, w.startMember(w.members[0]), "start the store again")
		w.waitStore(t)
	}
	cancel()
	writers.Wait()
	w.waitAPIServer(t)
	var list *corev1.ConfigMapList
	eventually(t, "a list after the crash", func(ctx context.Context) (err error) {
		list, err = api.List(ctx, metav1.ListOptions{})
		return err
	})
	present := map[string]string{}
	for _, item := range list.Items {
		present[item.Name] = item.ResourceVersion
	}
	at, err := strconv.ParseInt(list.ResourceVersion, 10, 64)
	must(t, err, "parse the list's version")
	for name, version := range acknowledged {
		if present[name] != version {
			t.Fatalf("%s was acknowledged at %s and is now at %q", name, version, present[name])
		}
		if revision, _ := strconv.ParseInt(version, 10, 64); revision > at {
			t.Fatalf("the store went back to %d behind %d", at, revision)
		}
	}
	eventually(t, "a write after the crash", func(ctx context.Context) error {
		_, err := api.Create(ctx, configMap("after-crash", 0), metav1.CreateOptions{})
		return err
	})
	f.waitEqual(t, w, "small")
	t.Logf("%d creates were acknowledged around the crashes", len(acknowledged))
}

// Two apiservers share the store and know nothing of each other: a list from one must show what the
// other has just acknowledged, though each answers from a cache of its own.
func twoAPIServers(t *testing.T, w *world) {
	const secondAddress = "192.0.2.2"
	w.second = w.launchAPIServer(t, "second.log", w.secondPort, secondAddress)
	w.waitReady(t, w.second, w.secondPort)
	clients, err := kubernetes.NewForConfig(w.configFor(w.secondPort))
	must(t, err, "make a client of the second apiserver")
	here, there := w.clients.CoreV1().ConfigMaps("small"), clients.CoreV1().ConfigMaps("small")
	for i := range 50 {
		name := fmt.Sprintf("shared-%02d", i)
		_, err := here.Create(background(), configMap(name, i), metav1.CreateOptions{})
		must(t, err, "create at the first")
		list, err := there.List(background(), metav1.ListOptions{LabelSelector: "test=kelson"})
		must(t, err, "list at the second")
		if !slices.ContainsFunc(list.Items, func(item corev1.ConfigMap) bool {
			return item.Name == name
		}) {
			t.Fatalf("the second apiserver's list at %s misses %s", list.ResourceVersion, name)
		}
		must(t, there.Delete(background(), name, metav1.DeleteOptions{}), "delete at the second")
		_, err = here.Get(background(), name, metav1.GetOptions{})
		if !apierrors.IsNotFound(err) {
			t.Fatalf("the first apiserver still finds %s: %v", name, err)
		}
	}
	eventually(t, "the second announcement", func(ctx context.Context) error {
		answer, err := w.etcd.Get(ctx, "/registry/masterleases/", clientv3.WithPrefix())
		if err == nil && len(answer.Kvs) != 2 {
			return fmt.Errorf("%d announcements", len(answer.Kvs))
		}
		return err
	})
	w.second.kill()
}

// An apiserver that is killed cannot say goodbye: its announcement has to expire.
func masterLeaseExpires(t *testing.T, w *world) {
	waitMasterLease(t, w, 0)
	w.apiserver.kill()
	eventually(t, "the announcement expires", func(ctx context.Context) error {
		answer, err := w.etcd.Get(ctx, "/registry/masterleases/", clientv3.WithPrefix())
		if err == nil && len(answer.Kvs) != 0 {
			return fmt.Errorf("%s is still there", answer.Kvs[0].Key)
		}
		return err
	})
	for _, m := range w.members {
		m.process.terminate(t)
	}
}

func sameItems(t *testing.T, before, after *corev1.ConfigMapList) {
	t.Helper()
	if len(before.Items) != len(after.Items) {
		t.Fatalf("%d objects before, %d after", len(before.Items), len(after.Items))
	}
	for i := range before.Items {
		old, now := &before.Items[i], &after.Items[i]
		if old.Name != now.Name || old.ResourceVersion != now.ResourceVersion || old.UID != now.UID {
			t.Fatalf("%s at %s became %s at %s", old.Name, old.ResourceVersion, now.Name,
				now.ResourceVersion)
		}
	}
}
