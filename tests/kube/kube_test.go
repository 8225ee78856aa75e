// Package kube runs an unmodified kube-apiserver on the store under test and checks what its users
// rely on. It never looks into the store's files: everything goes over TLS, as in a cluster.
//
// KELSON_BIN names the store (any program with etcd's flags, so real etcd can be checked as well),
// KUBE_APISERVER_BIN the apiserver. Both are set by `cargo xtask kube`.
package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/util/retry"
)

// The steps share one cluster and build on each other's objects, so they run in this order.
func TestKube(t *testing.T) {
	w := newWorld(t, 1)
	runSteps(t, w, []step{
		{"StrangersAreRefused", strangersAreRefused},
		{"Namespaces", namespaces},
		{"MasterLease", masterLease},
		{"TwoThousandConfigMaps", twoThousandConfigMaps},
		{"PagedList", pagedList},
		{"ConsistentReadsFromCache", consistentReadsFromCache},
		{"WatchAndResume", watchAndResume},
		{"WatchListAndBookmarks", watchListAndBookmarks},
		{"UpdateConflicts", updateConflicts},
		{"Preconditions", preconditions},
		{"LargeObjects", largeObjects},
		{"CustomResources", customResources},
		{"EventsExpire", eventsExpire},
		{"Finalizers", finalizers},
		{"CompactionAndGone", compactionAndGone},
		{"APIServerRestart", apiserverRestart},
		{"StoreCrash", storeCrash},
		{"TwoAPIServers", twoAPIServers},
		{"DeleteCollection", deleteCollection},
		{"MasterLeaseExpires", masterLeaseExpires},
	})
}

type step struct {
	name string
	run  func(*testing.T, *world)
}

func runSteps(t *testing.T, w *world, steps []step) {
	for _, step := range steps {
		if !t.Run(step.name, func(t *testing.T) { step.run(t, w) }) {
			t.Fatalf("%s failed; later steps need its state", step.name)
		}
	}
}

const (
	bulkNamespace = "bulk"
	bulkCount     = 2000
)

func background() context.Context { return context.Background() }

// Client certificates are demanded: TLS alone must not be enough.
func strangersAreRefused(t *testing.T, w *world) {
	client, err := clientv3.New(clientv3.Config{
		Endpoints: w.storeURLs(), TLS: w.pki.clientTLS(t, false), Logger: zap.NewNop(),
	})
	must(t, err, "make a client without a certificate")
	defer client.Close()
	ctx, cancel := context.WithTimeout(background(), 2*time.Second)
	defer cancel()
	if _, err := client.Get(ctx, "/registry/health"); err == nil {
		t.Fatal("the store answered a client without a certificate")
	}
}

func namespaces(t *testing.T, w *world) {
	api := w.clients.CoreV1().Namespaces()
	for _, name := range []string{bulkNamespace, "small", "doomed"} {
		created, err := api.Create(background(), namespaceNamed(name), metav1.CreateOptions{})
		must(t, err, "create namespace "+name)
		if revisionOf(t, created) == 0 {
			t.Fatalf("namespace %s came back without a resourceVersion", name)
		}
	}
	_, err := api.Create(background(), namespaceNamed(bulkNamespace), metav1.CreateOptions{})
	if !apierrors.IsAlreadyExists(err) {
		t.Fatalf("second create: want AlreadyExists, got %v", err)
	}
	// The apiserver makes these itself when it starts.
	for _, name := range []string{"default", "kube-system"} {
		eventually(t, "namespace "+name, func(ctx context.Context) error {
			_, err := api.Get(ctx, name, metav1.GetOptions{})
			return err
		})
	}
	// No controller runs here, so the test takes the namespace finalizer away.
	must(t, api.Delete(background(), "doomed", metav1.DeleteOptions{}), "delete a namespace")
	terminating, err := api.Get(background(), "doomed", metav1.GetOptions{})
	must(t, err, "get the terminating namespace")
	if terminating.Status.Phase != corev1.NamespaceTerminating {
		t.Fatalf("phase is %q", terminating.Status.Phase)
	}
	terminating.Spec.Finalizers = nil
	_, err = api.Finalize(background(), terminating, metav1.UpdateOptions{})
	must(t, err, "finalize the namespace")
	_, err = api.Get(background(), "doomed", metav1.GetOptions{})
	if !apierrors.IsNotFound(err) {
		t.Fatalf("get after finalize: want NotFound, got %v", err)
	}
}

func namespaceNamed(name string) *corev1.Namespace {
	return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}
}

// The apiserver announces itself under a lease of 15 s and moves to a new lease every 10 s.
func masterLease(t *testing.T, w *world) {
	first := waitMasterLease(t, w, 0)
	second := waitMasterLease(t, w, first)
	if first == second {
		t.Fatalf("the announcement still hangs on lease %x", first)
	}
	eventually(t, "the old lease ends by itself", func(ctx context.Context) error {
		answer, err := w.etcd.TimeToLive(ctx, clientv3.LeaseID(first))
		if err == nil && answer.TTL >= 0 {
			return fmt.Errorf("lease %x has %d s left", first, answer.TTL)
		}
		return err
	})
	waitMasterLease(t, w, 0)
}

// waitMasterLease returns the lease of the announcement once it is another one than old.
func waitMasterLease(t *testing.T, w *world, old int64) int64 {
	t.Helper()
	var lease int64
	eventually(t, "a master lease", func(ctx context.Context) error {
		answer, err := w.etcd.Get(ctx, "/registry/masterleases/"+advertiseAddress)
		if err != nil {
			return err
		}
		if len(answer.Kvs) != 1 {
			return fmt.Errorf("%d keys", len(answer.Kvs))
		}
		lease = answer.Kvs[0].Lease
		if lease == 0 || lease == old {
			return fmt.Errorf("lease is %x", lease)
		}
		return nil
	})
	return lease
}

func twoThousandConfigMaps(t *testing.T, w *world) {
	api := w.clients.CoreV1().ConfigMaps(bulkNamespace)
	parallel(t, 16, bulkCount, func(i int) error {
		_, err := api.Create(background(), configMap(bulkName(i), i), metav1.CreateOptions{})
		return err
	})
	list, err := api.List(background(), metav1.ListOptions{})
	must(t, err, "list all")
	seen := map[int64]string{}
	for _, item := range list.Items {
		revision := revisionOf(t, &item)
		if other, taken := seen[revision]; taken {
			t.Fatalf("%s and %s share revision %d", item.Name, other, revision)
		}
		seen[revision] = item.Name
		n, err := strconv.Atoi(item.Data["n"])
		must(t, err, "parse the data of "+item.Name)
		if bulkName(n) != item.Name {
			t.Fatalf("%s holds %d", item.Name, n)
		}
	}
	if len(list.Items) != bulkCount {
		t.Fatalf("listed %d of %d", len(list.Items), bulkCount)
	}
	answer, err := w.etcd.Get(background(), "/registry/configmaps/"+bulkNamespace+"/",
		clientv3.WithPrefix(), clientv3.WithCountOnly())
	must(t, err, "count in the store")
	if answer.Count != bulkCount {
		t.Fatalf("the store counts %d", answer.Count)
	}
}

func bulkName(i int) string { return fmt.Sprintf("cm%04d", i) }

func configMap(name string, n int) *corev1.ConfigMap {
	return &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"test": "kelson"}},
		Data:       map[string]string{"n": strconv.Itoa(n)},
	}
}

// Pages come from one revision: what is written between them must not show.
func pagedList(t *testing.T, w *world) {
	api := w.clients.CoreV1().ConfigMaps(bulkNamespace)
	const limit = 300
	var names []string
	var version, next string
	for page := 0; ; page++ {
		list, err := api.List(background(), metav1.ListOptions{Limit: limit, Continue: next})
		must(t, err, fmt.Sprintf("page %d", page))
		for _, item := range list.Items {
			names = append(names, item.Name)
		}
		if page == 0 {
			version = list.ResourceVersion
			// One object behind the last page and one change inside it.
			_, err := api.Create(background(), configMap("zz-late", 0), metav1.CreateOptions{})
			must(t, err, "create between pages")
			must(t, api.Delete(background(), bulkName(bulkCount-1), metav1.DeleteOptions{}),
				"delete between pages")
		}
		if list.ResourceVersion != version {
			t.Fatalf("page %d is from %s, the first from %s", page, list.ResourceVersion, version)
		}
		next = list.Continue
		if next == "" {
			break
		}
		remaining := int64(bulkCount - len(names))
		if list.RemainingItemCount == nil || *list.RemainingItemCount != remaining {
			t.Fatalf("page %d: want %d remaining, got %v", page, remaining, list.RemainingItemCount)
		}
	}
	if len(names) != bulkCount {
		t.Fatalf("pages hold %d of %d", len(names), bulkCount)
	}
	for i, name := range names {
		if name != bulkName(i) {
			t.Fatalf("item %d is %s", i, name)
		}
	}
	_, err := api.Create(background(), configMap(bulkName(bulkCount-1), bulkCount-1),
		metav1.CreateOptions{})
	must(t, err, "put the deleted one back")
	must(t, api.Delete(background(), "zz-late", metav1.DeleteOptions{}), "delete the late one")
}

func updateConflicts(t *testing.T, w *world) {
	api := w.clients.CoreV1().ConfigMaps("small")
	first, err := api.Create(background(), configMap("contended", 0), metav1.CreateOptions{})
	must(t, err, "create")
	stale := first.DeepCopy()
	first.Data["n"] = "1"
	_, err = api.Update(background(), first, metav1.UpdateOptions{})
	must(t, err, "update")
	stale.Data["n"] = "2"
	_, err = api.Update(background(), stale, metav1.UpdateOptions{})
	if !apierrors.IsConflict(err) {
		t.Fatalf("update from a stale copy: want Conflict, got %v", err)
	}
	const writers, rounds = 8, 20
	var conflicts atomic.Int64
	patient := retry.DefaultRetry
	patient.Steps = 1000
	parallel(t, writers, writers*rounds, func(int) error {
		return retry.RetryOnConflict(patient, func() error {
			current, err := api.Get(background(), "contended", metav1.GetOptions{})
			if err != nil {
				return err
			}
			n, err := strconv.Atoi(current.Data["n"])
			if err != nil {
				return err
			}
			current.Data["n"] = strconv.Itoa(n + 1)
			_, err = api.Update(background(), current, metav1.UpdateOptions{})
			if apierrors.IsConflict(err) {
				conflicts.Add(1)
			}
			return err
		})
	})
	final, err := api.Get(background(), "contended", metav1.GetOptions{})
	must(t, err, "get")
	if want := strconv.Itoa(1 + writers*rounds); final.Data["n"] != want {
		t.Fatalf("counted to %s, want %s: an update was lost or applied twice", final.Data["n"], want)
	}
	t.Logf("%d conflicts", conflicts.Load())
}

func preconditions(t *testing.T, w *world) {
	api := w.clients.CoreV1().ConfigMaps("small")
	created, err := api.Create(background(), configMap("guarded", 0), metav1.CreateOptions{})
	must(t, err, "create")
	wrong := types.UID("not-this-one")
	err = api.Delete(background(), "guarded",
		metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &wrong}})
	if !apierrors.IsConflict(err) {
		t.Fatalf("delete with a wrong uid: want Conflict, got %v", err)
	}
	err = api.Delete(background(), "guarded", metav1.DeleteOptions{Preconditions: &metav1.Preconditions{
		UID: &created.UID, ResourceVersion: &created.ResourceVersion,
	}})
	must(t, err, "delete with the right uid and version")
	_, err = api.Update(background(), created, metav1.UpdateOptions{})
	if !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
		t.Fatalf("update of a deleted object: got %v", err)
	}
}

// Objects near the limit pass whole; one above the store's request limit is refused by the store.
func largeObjects(t *testing.T, w *world) {
	api := w.clients.CoreV1().ConfigMaps("small")
	large := configMap("large", 0)
	large.Data["blob"] = strings.Repeat("0123456789abcdef", 60_000)
	_, err := api.Create(background(), large, metav1.CreateOptions{})
	must(t, err, "create 960 kB")
	back, err := api.Get(background(), "large", metav1.GetOptions{})
	must(t, err, "get 960 kB")
	if back.Data["blob"] != large.Data["blob"] {
		t.Fatal("the large object came back changed")
	}
	// The apiserver's own limit on this kind comes before the store's, so the store is asked itself.
	_, err = w.etcd.Put(background(), "/kelson-test/large", strings.Repeat("x", 1_700_000))
	if err == nil || err.Error() != "etcdserver: request is too large" {
		t.Fatalf("1.7 MB: got %v", err)
	}
}

var widgets = schema.GroupVersionResource{Group: "test.example.com", Version: "v1", Resource: "widgets"}

func customResources(t *testing.T, w *world) {
	definitions := w.dynamic.Resource(schema.GroupVersionResource{
		Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions",
	})
	_, err := definitions.Create(background(), widgetDefinition(), metav1.CreateOptions{})
	must(t, err, "create the definition")
	eventually(t, "the definition is established", func(ctx context.Context) error {
		found, err := definitions.Get(ctx, "widgets.test.example.com", metav1.GetOptions{})
		if err != nil {
			return err
		}
		conditions, _, _ := unstructured.NestedSlice(found.Object, "status", "conditions")
		for _, condition := range conditions {
			fields := condition.(map[string]any)
			if fields["type"] == "Established" && fields["status"] == "True" {
				return nil
			}
		}
		return fmt.Errorf("conditions: %v", conditions)
	})
	api := w.dynamic.Resource(widgets).Namespace("small")
	eventually(t, "widgets are served", func(ctx context.Context) error {
		_, err := api.List(ctx, metav1.ListOptions{})
		return err
	})
	list, err := api.List(background(), metav1.ListOptions{})
	must(t, err, "list widgets")
	watcher, err := api.Watch(background(),
		metav1.ListOptions{ResourceVersion: list.GetResourceVersion()})
	must(t, err, "watch widgets")
	defer watcher.Stop()
	const count = 50
	var want []string
	for i := range count {
		name := fmt.Sprintf("widget-%02d", i)
		created, err := api.Create(background(), widget(name, i), metav1.CreateOptions{})
		must(t, err, "create "+name)
		want = append(want, "ADDED "+name+" "+created.GetResourceVersion())
	}
	patched, err := api.Patch(background(), "widget-00", types.MergePatchType,
		[]byte(`{"spec":{"size":7}}`), metav1.PatchOptions{})
	must(t, err, "patch a widget")
	want = append(want, "MODIFIED widget-00 "+patched.GetResourceVersion())
	must(t, unstructured.SetNestedField(patched.Object, "fine", "status", "state"), "set status")
	status, err := api.UpdateStatus(background(), patched, metav1.UpdateOptions{})
	must(t, err, "update status")
	want = append(want, "MODIFIED widget-00 "+status.GetResourceVersion())
	compareEvents(t, collect(t, watcher, len(want)), want)
	stored, err := w.etcd.Get(background(), "/registry/test.example.com/widgets/small/widget-00")
	must(t, err, "read the widget in the store")
	if len(stored.Kvs) != 1 || !json.Valid(stored.Kvs[0].Value) || stored.Kvs[0].Version != 3 {
		t.Fatalf("the store holds %v", stored.Kvs)
	}
}

func widget(name string, size int) *unstructured.Unstructured {
	return &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "test.example.com/v1", "kind": "Widget",
		"metadata": map[string]any{"name": name},
		"spec":     map[string]any{"size": int64(size)},
	}}
}

func widgetDefinition() *unstructured.Unstructured {
	text := `{
		"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
		"metadata": {"name": "widgets.test.example.com"},
		"spec": {
			"group": "test.example.com", "scope": "Namespaced",
			"names": {"plural": "widgets", "singular": "widget", "kind": "Widget"},
			"versions": [{
				"name": "v1", "served": true, "storage": true, "subresources": {"status": {}},
				"schema": {"openAPIV3Schema": {
					"type": "object", "x-kubernetes-preserve-unknown-fields": true
				}}
			}]
		}
	}`
	object := &unstructured.Unstructured{}
	if err := object.UnmarshalJSON([]byte(text)); err != nil {
		panic(err)
	}
	return object
}

func finalizers(t *testing.T, w *world) {
	api := w.clients.CoreV1().ConfigMaps("small")
	held := configMap("held", 0)
	held.Finalizers = []string{"test.example.com/hold"}
	_, err := api.Create(background(), held, metav1.CreateOptions{})
	must(t, err, "create")
	must(t, api.Delete(background(), "held", metav1.DeleteOptions{}), "delete")
	waiting, err := api.Get(background(), "held", metav1.GetOptions{})
	must(t, err, "get while held")
	if waiting.DeletionTimestamp == nil {
		t.Fatal("no deletionTimestamp")
	}
	watcher, err := api.Watch(background(), metav1.ListOptions{ResourceVersion: waiting.ResourceVersion})
	must(t, err, "watch")
	defer watcher.Stop()
	_, err = api.Patch(background(), "held", types.MergePatchType,
		[]byte(`{"metadata":{"finalizers":null}}`), metav1.PatchOptions{})
	must(t, err, "release")
	if event := collect(t, watcher, 1)[0]; event.Type != watch.Deleted {
		t.Fatalf("the release shows as %s", event.Type)
	}
	_, err = api.Get(background(), "held", metav1.GetOptions{})
	if !apierrors.IsNotFound(err) {
		t.Fatalf("get after release: want NotFound, got %v", err)
	}
}

func deleteCollection(t *testing.T, w *world) {
	api := w.clients.CoreV1().ConfigMaps(bulkNamespace)
	err := api.DeleteCollection(background(), metav1.DeleteOptions{}, metav1.ListOptions{})
	must(t, err, "delete the collection")
	list, err := api.List(background(), metav1.ListOptions{})
	must(t, err, "list")
	if len(list.Items) != 0 {
		t.Fatalf("%d objects are left", len(list.Items))
	}
}

// parallel calls work for 0..count from a number of goroutines and fails on the first error.
func parallel(t *testing.T, workers, count int, work func(int) error) {
	t.Helper()
	var next atomic.Int64
	failures := make(chan error, workers)
	var group sync.WaitGroup
	for range workers {
		group.Go(func() {
			for {
				i := int(next.Add(1)) - 1
				if i >= count {
					return
				}
				if err := work(i); err != nil {
					failures <- fmt.Errorf("item %d: %w", i, err)
					return
				}
			}
		})
	}
	group.Wait()
	close(failures)
	if err := <-failures; err != nil {
		t.Fatal(err)
	}
}

func revisionOf(t *testing.T, object metav1.Object) int64 {
	t.Helper()
	revision, err := strconv.ParseInt(object.GetResourceVersion(), 10, 64)
	must(t, err, "parse the resourceVersion of "+object.GetName())
	return revision
}
