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
	"slices"
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
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/retry"
)

// The steps share one cluster and build on each other's objects, so they run in this order.
func TestKube(t *testing.T) {
	w := newWorld(t)
	steps := []struct {
		name string
		run  func(*testing.T, *world)
	}{
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
	}
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
		Endpoints: []string{w.storeURL()}, TLS: w.pki.clientTLS(t, false), Logger: zap.NewNop(),
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

// A list without resourceVersion is served from the watch cache after a progress notice from the
// store. It must show the write before it, and the apiserver must not have given up on the cache.
func consistentReadsFromCache(t *testing.T, w *world) {
	api := w.clients.CoreV1().ConfigMaps("small")
	for i := range 50 {
		name := fmt.Sprintf("seen-%02d", i)
		_, err := api.Create(background(), configMap(name, i), metav1.CreateOptions{})
		must(t, err, "create "+name)
		list, err := api.List(background(), metav1.ListOptions{})
		must(t, err, "list")
		found := false
		for _, item := range list.Items {
			found = found || item.Name == name
		}
		if !found {
			t.Fatalf("the list at %s misses %s", list.ResourceVersion, name)
		}
	}
	text, err := w.clients.RESTClient().Get().AbsPath("/metrics").DoRaw(background())
	must(t, err, "read the apiserver's metrics")
	served := 0.0
	for _, line := range strings.Split(string(text), "\n") {
		if !strings.HasPrefix(line, "apiserver_watch_cache_consistent_read_total{") ||
			!strings.Contains(line, `resource="configmaps"`) {
			continue
		}
		count, err := strconv.ParseFloat(line[strings.LastIndex(line, " ")+1:], 64)
		must(t, err, "parse "+line)
		if strings.Contains(line, `fallback="true"`) && count > 0 {
			t.Fatalf("consistent reads fell back to the store: %s", line)
		}
		if strings.Contains(line, `success="true"`) {
			served += count
		}
	}
	if served < 50 {
		t.Fatalf("only %v consistent reads were served from the cache", served)
	}
}

// A watch shows each change once and in order; one resumed in the middle shows exactly the rest.
func watchAndResume(t *testing.T, w *world) {
	api := w.clients.CoreV1().ConfigMaps("small")
	list, err := api.List(background(), metav1.ListOptions{})
	must(t, err, "list")
	watcher, err := api.Watch(background(), metav1.ListOptions{ResourceVersion: list.ResourceVersion})
	must(t, err, "watch")
	defer watcher.Stop()
	var want []string
	for i := range 40 {
		name := fmt.Sprintf("watched-%02d", i)
		created, err := api.Create(background(), configMap(name, i), metav1.CreateOptions{})
		must(t, err, "create")
		want = append(want, "ADDED "+name+" "+created.ResourceVersion)
		created.Data["n"] = "changed"
		updated, err := api.Update(background(), created, metav1.UpdateOptions{})
		must(t, err, "update")
		want = append(want, "MODIFIED "+name+" "+updated.ResourceVersion)
		if i%2 == 0 {
			must(t, api.Delete(background(), name, metav1.DeleteOptions{}), "delete")
			want = append(want, "DELETED "+name)
		}
	}
	all := collect(t, watcher, len(want))
	compareEvents(t, all, want)

	middle := len(want) / 2
	for !strings.HasPrefix(want[middle], "MODIFIED") {
		middle++
	}
	version := want[middle][strings.LastIndex(want[middle], " ")+1:]
	resumed, err := api.Watch(background(), metav1.ListOptions{ResourceVersion: version})
	must(t, err, "resume")
	defer resumed.Stop()
	compareEvents(t, collect(t, resumed, len(want)-middle-1), want[middle+1:])
}

func collect(t *testing.T, watcher watch.Interface, count int) []watch.Event {
	t.Helper()
	var events []watch.Event
	deadline := time.After(patience)
	for len(events) < count {
		select {
		case event, open := <-watcher.ResultChan():
			if !open {
				t.Fatalf("the watch ended after %d of %d events", len(events), count)
			}
			if event.Type == watch.Error {
				t.Fatalf("the watch failed: %v", apierrors.FromObject(event.Object))
			}
			events = append(events, event)
		case <-deadline:
			t.Fatalf("%d of %d events", len(events), count)
		}
	}
	return events
}

// compareEvents checks type, name and revision; a deletion's revision is only known to be later.
func compareEvents(t *testing.T, events []watch.Event, want []string) {
	t.Helper()
	last := int64(0)
	for i, event := range events {
		object := event.Object.(metav1.Object)
		revision := revisionOf(t, object)
		if revision <= last {
			t.Fatalf("event %d is at %d after %d", i, revision, last)
		}
		last = revision
		got := fmt.Sprintf("%s %s", event.Type, object.GetName())
		if event.Type != watch.Deleted {
			got += " " + object.GetResourceVersion()
		}
		if got != want[i] {
			t.Fatalf("event %d: got %q, want %q", i, got, want[i])
		}
	}
}

// A streamed list ends with a bookmark, and later bookmarks move past writes to other resources,
// which only progress notices from the store can tell.
func watchListAndBookmarks(t *testing.T, w *world) {
	yes := true
	timeout := int64(20)
	watcher, err := w.clients.CoreV1().ConfigMaps(bulkNamespace).Watch(background(),
		metav1.ListOptions{
			SendInitialEvents: &yes, AllowWatchBookmarks: true, TimeoutSeconds: &timeout,
			ResourceVersionMatch: metav1.ResourceVersionMatchNotOlderThan,
		})
	must(t, err, "watch-list")
	defer watcher.Stop()
	events := collect(t, watcher, bulkCount+1)
	for i, event := range events[:bulkCount] {
		if event.Type != watch.Added {
			t.Fatalf("event %d is %s", i, event.Type)
		}
	}
	end := events[bulkCount]
	object := end.Object.(metav1.Object)
	if end.Type != watch.Bookmark ||
		object.GetAnnotations()[metav1.InitialEventsAnnotationKey] != "true" {
		t.Fatalf("after the last object came %s %v", end.Type, object.GetAnnotations())
	}

	other, err := w.clients.CoreV1().Secrets("small").Create(background(),
		&corev1.Secret{ObjectMeta: metav1.ObjectMeta{GenerateName: "other-"}},
		metav1.CreateOptions{})
	must(t, err, "write another resource")
	// The apiserver sends a bookmark shortly before it ends a watch.
	for {
		event, open := <-watcher.ResultChan()
		if !open {
			t.Fatal("the watch ended without a bookmark behind the other write")
		}
		if event.Type != watch.Bookmark {
			t.Fatalf("unexpected %s", event.Type)
		}
		if revisionOf(t, event.Object.(metav1.Object)) >= revisionOf(t, other) {
			return
		}
	}
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
	// Annotations and data have limits of their own; the managed fields of many keys do not.
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

// Nobody deletes events: the lease does, and watchers have to hear of it.
func eventsExpire(t *testing.T, w *world) {
	api := w.clients.CoreV1().Events("small")
	list, err := api.List(background(), metav1.ListOptions{})
	must(t, err, "list events")
	watcher, err := api.Watch(background(), metav1.ListOptions{ResourceVersion: list.ResourceVersion})
	must(t, err, "watch events")
	defer watcher.Stop()
	const count = 30
	for i := range count {
		_, err := api.Create(background(), &corev1.Event{
			ObjectMeta:     metav1.ObjectMeta{Name: fmt.Sprintf("event-%02d", i)},
			InvolvedObject: corev1.ObjectReference{Namespace: "small", Name: "x"},
			Reason:         "Test", Message: "made to expire",
		}, metav1.CreateOptions{})
		must(t, err, "create an event")
	}
	stored, err := w.etcd.Get(background(), "/registry/events/small/", clientv3.WithPrefix())
	must(t, err, "read events in the store")
	for _, kv := range stored.Kvs {
		if kv.Lease == 0 {
			t.Fatalf("%s has no lease", kv.Key)
		}
	}
	added, deleted := map[string]bool{}, map[string]bool{}
	for _, event := range collect(t, watcher, 2*count) {
		name := event.Object.(*corev1.Event).Name
		switch event.Type {
		case watch.Added:
			added[name] = true
		case watch.Deleted:
			// The deletion carries the object as it was: the store sent the value before.
			if event.Object.(*corev1.Event).Message != "made to expire" {
				t.Fatalf("deletion of %s came without the object", name)
			}
			deleted[name] = true
		default:
			t.Fatalf("unexpected %s", event.Type)
		}
	}
	if len(added) != count || len(deleted) != count {
		t.Fatalf("%d added, %d deleted", len(added), len(deleted))
	}
	left, err := api.List(background(), metav1.ListOptions{})
	must(t, err, "list events")
	if len(left.Items) != 0 {
		t.Fatalf("%d events outlived their lease", len(left.Items))
	}
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
		w.store.kill()
		w.startStore(t)
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
	w.store.terminate(t)
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
