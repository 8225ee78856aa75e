package kube

// What watchers and readers from the apiserver's cache see.

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
)

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
