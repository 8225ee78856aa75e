// Drives the store with etcd's own Go client: put, get, delete, transaction, watch, lease, and the
// packages that come with it: concurrency, leasing, mirror, namespace, naming and ordering, which need
// no service of their own. It never prints anything on success; the first surprise ends it with a
// message and status 1.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	"go.uber.org/zap"
	"google.golang.org/protobuf/proto"
)

const prefix = "client-go/"

func main() {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	client, err := dial()
	if err != nil {
		fail("connect", err)
	}
	defer client.Close()
	steps := []struct {
		name string
		run  func(context.Context, *clientv3.Client) error
	}{
		{"keys", keys}, {"streamed list", streamedList}, {"transactions", transactions}, {"watches", watches},
		{"progress", progress}, {"fragments", fragments}, {"leases", leases}, {"locks", locks},
		{"election", election}, {"compaction", compaction}, {"refusals", refusals},
		{"sessions", sessions}, {"try locks", tryLocks}, {"terms", terms}, {"memory", memory},
		{"leased reads", leasedReads}, {"mirror", mirrored}, {"namespaces", namespaces},
		{"ordered reads", ordered}, {"names", names}, {"users", users},
	}
	if _, err := client.Delete(ctx, prefix, clientv3.WithPrefix()); err != nil {
		fail("clean up", err)
	}
	for _, step := range steps {
		if err := step.run(ctx, client); err != nil {
			fail(step.name, err)
		}
	}
}

// dial makes one more client; nothing is shared with another but the store.
func dial() (*clientv3.Client, error) {
	return clientv3.New(clientv3.Config{
		Endpoints:   []string{os.Getenv("ENDPOINT")},
		DialTimeout: 10 * time.Second,
		// Otherwise the client reports every refusal that the checks provoke.
		Logger: zap.NewNop(),
	})
}

func fail(step string, err error) {
	fmt.Fprintf(os.Stderr, "%s: %v\n", step, err)
	os.Exit(1)
}

// same reports a difference; values are compared by how they print.
func same(what string, got, want any) error {
	if fmt.Sprint(got) != fmt.Sprint(want) {
		return fmt.Errorf("%s: got %v, want %v", what, got, want)
	}
	return nil
}

func keys(ctx context.Context, client *clientv3.Client) error {
	first, err := client.Put(ctx, prefix+"a", "1")
	if err != nil {
		return err
	}
	second, err := client.Put(ctx, prefix+"a", "2", clientv3.WithPrevKV())
	if err != nil {
		return err
	}
	if _, err := client.Put(ctx, prefix+"b", "x"); err != nil {
		return err
	}
	all, err := client.Get(ctx, prefix, clientv3.WithPrefix(), clientv3.WithLimit(1),
		clientv3.WithSort(clientv3.SortByKey, clientv3.SortDescend))
	if err != nil {
		return err
	}
	old, err := client.Get(ctx, prefix+"a", clientv3.WithRev(first.Header.Revision))
	if err != nil {
		return err
	}
	bare, err := client.Get(ctx, prefix, clientv3.WithPrefix(), clientv3.WithKeysOnly())
	if err != nil {
		return err
	}
	gone, err := client.Delete(ctx, prefix, clientv3.WithPrefix(), clientv3.WithPrevKV())
	if err != nil {
		return err
	}
	return errors.Join(
		same("revision", second.Header.Revision, first.Header.Revision+1),
		same("previous value", string(second.PrevKv.Value), "1"),
		same("limited list", []any{all.Count, all.More, len(all.Kvs)}, []any{2, true, 1}),
		same("descending", string(all.Kvs[0].Key), prefix+"b"),
		same("old value", string(old.Kvs[0].Value), "1"),
		same("keys only", len(bare.Kvs[0].Value), 0),
		same("deleted", gone.Deleted, 2),
		same("deleted pairs", len(gone.PrevKvs), 2),
	)
}

// A streamed list holds what a plain list of the same revision holds, header and count included.
func streamedList(ctx context.Context, client *clientv3.Client) error {
	value := string(make([]byte, 20_000))
	for i := range 200 {
		if _, err := client.Put(ctx, fmt.Sprintf("%sstream/%03d", prefix, i), value); err != nil {
			return err
		}
	}
	for _, limit := range []int64{0, 50} {
		options := []clientv3.OpOption{clientv3.WithPrefix(), clientv3.WithLimit(limit)}
		plain, err := client.Get(ctx, prefix+"stream/", options...)
		if err != nil {
			return err
		}
		chunks, err := client.GetStream(ctx, prefix+"stream/", options...)
		if err != nil {
			return err
		}
		streamed, err := clientv3.GetStreamToGetResponse(chunks)
		if err != nil {
			return err
		}
		if !proto.Equal((*pb.RangeResponse)(plain), (*pb.RangeResponse)(streamed)) {
			return fmt.Errorf("limit %d: the plain list has %d of %d pairs at %d, the stream %d of %d at %d",
				limit, len(plain.Kvs), plain.Count, plain.Header.Revision,
				len(streamed.Kvs), streamed.Count, streamed.Header.Revision)
		}
	}
	_, err := client.Delete(ctx, prefix+"stream/", clientv3.WithPrefix())
	return err
}

func transactions(ctx context.Context, client *clientv3.Client) error {
	key := prefix + "t"
	create := func() (*clientv3.TxnResponse, error) {
		return client.Txn(ctx).
			If(clientv3.Compare(clientv3.CreateRevision(key), "=", 0)).
			Then(clientv3.OpPut(key, "first")).
			Else(clientv3.OpGet(key)).
			Commit()
	}
	first, err := create()
	if err != nil {
		return err
	}
	second, err := create()
	if err != nil {
		return err
	}
	nested, err := client.Txn(ctx).
		If(clientv3.Compare(clientv3.Value(key), "=", "first")).
		Then(clientv3.OpPut(prefix+"u", "1"), clientv3.OpTxn(
			[]clientv3.Cmp{clientv3.Compare(clientv3.Version(prefix+"u"), ">", 5)},
			nil,
			[]clientv3.Op{clientv3.OpGet(prefix + "u"), clientv3.OpDelete(key)},
		)).Commit()
	if err != nil {
		return err
	}
	inner := nested.Responses[1].GetResponseTxn()
	return errors.Join(
		same("first create", first.Succeeded, true),
		same("second create", second.Succeeded, false),
		same("found", string(second.Responses[0].GetResponseRange().Kvs[0].Value), "first"),
		same("inner branch", inner.Succeeded, false),
		same("inner read", string(inner.Responses[0].GetResponseRange().Kvs[0].Value), "1"),
		same("inner delete", inner.Responses[1].GetResponseDeleteRange().Deleted, 1),
		same("one revision", nested.Header.Revision, second.Header.Revision+1),
	)
}

func watches(ctx context.Context, client *clientv3.Client) error {
	key := prefix + "w"
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	put, err := client.Put(ctx, key, "0")
	if err != nil {
		return err
	}
	from := put.Header.Revision
	// Two watches on one stream: one begins in the past, one filters deletions.
	full := client.Watch(ctx, key, clientv3.WithRev(from), clientv3.WithPrevKV())
	puts := client.Watch(ctx, key, clientv3.WithRev(from), clientv3.WithFilterDelete())
	for i := range 100 {
		if _, err := client.Put(ctx, key, fmt.Sprint(i+1)); err != nil {
			return err
		}
	}
	if _, err := client.Delete(ctx, key); err != nil {
		return err
	}
	if _, err := client.Put(ctx, key, "last"); err != nil {
		return err
	}
	seen, err := hear(full, 103)
	if err != nil {
		return err
	}
	for i, event := range seen {
		if event.Kv.ModRevision != from+int64(i) {
			return fmt.Errorf("event %d is at %d, the watch began at %d", i, event.Kv.ModRevision, from)
		}
		wantsBefore := i > 0 && i < 102
		if (event.PrevKv != nil) != wantsBefore {
			return fmt.Errorf("event %d: previous pair is %v", i, event.PrevKv)
		}
	}
	filtered, err := hear(puts, 102)
	if err != nil {
		return err
	}
	deleted := slices.ContainsFunc(filtered, func(event *clientv3.Event) bool {
		return event.Type == clientv3.EventTypeDelete
	})
	return errors.Join(
		same("event 101", seen[101].Type, clientv3.EventTypeDelete),
		same("a deletion behind the filter", deleted, false),
	)
}

func hear(watch clientv3.WatchChan, count int) ([]*clientv3.Event, error) {
	var events []*clientv3.Event
	for len(events) < count {
		response, open := <-watch
		if !open {
			return nil, fmt.Errorf("the watch ended after %d of %d events", len(events), count)
		}
		if err := response.Err(); err != nil {
			return nil, err
		}
		events = append(events, response.Events...)
	}
	return events, nil
}

// A progress answer tells a quiet watcher how far the store has come.
func progress(ctx context.Context, client *clientv3.Client) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	watch := client.Watch(ctx, prefix+"quiet", clientv3.WithCreatedNotify())
	if created := <-watch; !created.Created {
		return fmt.Errorf("the watch began with %v", created)
	}
	put, err := client.Put(ctx, prefix+"other", "")
	if err != nil {
		return err
	}
	for {
		if err := client.RequestProgress(ctx); err != nil {
			return err
		}
		select {
		case response := <-watch:
			if !response.IsProgressNotify() {
				return fmt.Errorf("want a progress answer, got %v", response)
			}
			if response.Header.Revision >= put.Header.Revision {
				return nil
			}
		case <-time.After(time.Second):
			// The store may leave a request without an answer while a watcher catches up.
		}
	}
}

// One revision that is larger than a message arrives in pieces and is put together by the client.
func fragments(ctx context.Context, client *clientv3.Client) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	watch := client.Watch(ctx, prefix+"big/", clientv3.WithPrefix(), clientv3.WithFragment(),
		clientv3.WithCreatedNotify())
	if created := <-watch; !created.Created {
		return fmt.Errorf("the watch began with %v", created)
	}
	value := string(make([]byte, 100_000))
	var puts []clientv3.Op
	for i := range 10 {
		puts = append(puts, clientv3.OpPut(fmt.Sprintf("%sbig/%d", prefix, i), value))
	}
	if _, err := client.Txn(ctx).Then(puts...).Commit(); err != nil {
		return err
	}
	events, err := hear(watch, len(puts))
	if err != nil {
		return err
	}
	return same("one revision", events[0].Kv.ModRevision, events[len(events)-1].Kv.ModRevision)
}

func leases(ctx context.Context, client *clientv3.Client) error {
	lease, err := client.Grant(ctx, 60)
	if err != nil {
		return err
	}
	if _, err := client.Put(ctx, prefix+"l", "", clientv3.WithLease(lease.ID)); err != nil {
		return err
	}
	kept, err := client.KeepAliveOnce(ctx, lease.ID)
	if err != nil {
		return err
	}
	left, err := client.TimeToLive(ctx, lease.ID, clientv3.WithAttachedKeys())
	if err != nil {
		return err
	}
	listed, err := client.Leases(ctx)
	if err != nil {
		return err
	}
	if _, err := client.Revoke(ctx, lease.ID); err != nil {
		return err
	}
	gone, err := client.Get(ctx, prefix+"l")
	if err != nil {
		return err
	}
	expired, err := client.TimeToLive(ctx, lease.ID)
	if err != nil {
		return err
	}
	_, unknown := client.KeepAliveOnce(ctx, lease.ID)
	return errors.Join(
		same("time to live", kept.TTL, 60),
		same("granted", left.GrantedTTL, 60),
		same("keys", fmt.Sprintf("%s", left.Keys), "["+prefix+"l]"),
		same("listed", slices.Contains(listed.Leases, clientv3.LeaseStatus{ID: lease.ID}), true),
		same("keys after the revocation", gone.Count, 0),
		same("time to live after the revocation", expired.TTL, -1),
		same("keep-alive after the revocation", unknown, rpctypes.ErrLeaseNotFound),
		kept60(ctx, client), expires(ctx, client),
	)
}

// kept60 lets the client keep a short lease alive in the background for longer than its term.
func kept60(ctx context.Context, client *clientv3.Client) error {
	lease, err := client.Grant(ctx, 2)
	if err != nil {
		return err
	}
	answers, err := client.KeepAlive(ctx, lease.ID)
	if err != nil {
		return err
	}
	until := time.Now().Add(4 * time.Second)
	for time.Now().Before(until) {
		if answer, open := <-answers; !open || answer.TTL <= 0 {
			return fmt.Errorf("a lease that was kept alive ended: %v", answer)
		}
	}
	_, err = client.Revoke(ctx, lease.ID)
	return err
}

func expires(ctx context.Context, client *clientv3.Client) error {
	lease, err := client.Grant(ctx, 2)
	if err != nil {
		return err
	}
	put, err := client.Put(ctx, prefix+"s", "v", clientv3.WithLease(lease.ID))
	if err != nil {
		return err
	}
	watching, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	watch := client.Watch(watching, prefix+"s", clientv3.WithRev(put.Header.Revision+1),
		clientv3.WithPrevKV())
	events, err := hear(watch, 1)
	if err != nil {
		return err
	}
	return errors.Join(
		same("end of a lease", events[0].Type, clientv3.EventTypeDelete),
		same("value before", string(events[0].PrevKv.Value), "v"),
	)
}

// Four clients add to one number under a lock; without mutual exclusion some additions get lost.
func locks(ctx context.Context, client *clientv3.Client) error {
	const workers, rounds = 4, 10
	total := 0
	failures := make(chan error, workers)
	var group sync.WaitGroup
	for range workers {
		group.Go(func() {
			session, err := concurrency.NewSession(client, concurrency.WithTTL(20))
			if err != nil {
				failures <- err
				return
			}
			defer session.Close()
			mutex := concurrency.NewMutex(session, prefix+"mutex")
			for range rounds {
				if err := mutex.Lock(ctx); err != nil {
					failures <- err
					return
				}
				before := total
				time.Sleep(time.Millisecond)
				total = before + 1
				if err := mutex.Unlock(ctx); err != nil {
					failures <- err
					return
				}
			}
		})
	}
	group.Wait()
	close(failures)
	return errors.Join(<-failures, same("additions under the lock", total, workers*rounds))
}

func election(ctx context.Context, client *clientv3.Client) error {
	first, err := concurrency.NewSession(client)
	if err != nil {
		return err
	}
	second, err := concurrency.NewSession(client)
	if err != nil {
		return err
	}
	defer second.Close()
	one := concurrency.NewElection(first, prefix+"election")
	two := concurrency.NewElection(second, prefix+"election")
	if err := one.Campaign(ctx, "one"); err != nil {
		return err
	}
	won := make(chan error, 1)
	go func() { won <- two.Campaign(ctx, "two") }()
	leader, err := two.Leader(ctx)
	if err != nil {
		return err
	}
	// The end of the session ends the term: the key hangs on the session's lease.
	if err := first.Close(); err != nil {
		return err
	}
	if err := <-won; err != nil {
		return err
	}
	next, err := two.Leader(ctx)
	if err != nil {
		return err
	}
	return errors.Join(
		same("leader", string(leader.Kvs[0].Value), "one"),
		same("next leader", string(next.Kvs[0].Value), "two"),
	)
}

func compaction(ctx context.Context, client *clientv3.Client) error {
	var last int64
	for i := range 5 {
		put, err := client.Put(ctx, prefix+"c", fmt.Sprint(i))
		if err != nil {
			return err
		}
		last = put.Header.Revision
	}
	if _, err := client.Compact(ctx, last, clientv3.WithCompactPhysical()); err != nil {
		return err
	}
	_, below := client.Get(ctx, prefix+"c", clientv3.WithRev(last-1))
	at, err := client.Get(ctx, prefix+"c", clientv3.WithRev(last))
	if err != nil {
		return err
	}
	_, again := client.Compact(ctx, last)
	_, ahead := client.Get(ctx, prefix+"c", clientv3.WithRev(last+1000))
	watching, cancel := context.WithCancel(ctx)
	defer cancel()
	lost := <-client.Watch(watching, prefix+"c", clientv3.WithRev(1))
	return errors.Join(
		same("read below", below, rpctypes.ErrCompacted),
		same("read at the compaction", string(at.Kvs[0].Value), "4"),
		same("second compaction", again, rpctypes.ErrCompacted),
		same("read in the future", ahead, rpctypes.ErrFutureRev),
		same("watch below", lost.Err(), rpctypes.ErrCompacted),
		same("compact revision of the watch", lost.CompactRevision, last),
	)
}

func refusals(ctx context.Context, client *clientv3.Client) error {
	_, empty := client.Put(ctx, "", "")
	_, large := client.Put(ctx, prefix+"large", string(make([]byte, 1_700_000)))
	_, twice := client.Txn(ctx).
		Then(clientv3.OpPut(prefix+"d", ""), clientv3.OpPut(prefix+"d", "")).Commit()
	_, lease := client.Put(ctx, prefix+"d", "", clientv3.WithLease(12345))
	many := slices.Repeat([]clientv3.Op{clientv3.OpGet(prefix)}, 129)
	_, ops := client.Txn(ctx).Then(many...).Commit()
	return errors.Join(
		same("empty key", empty, rpctypes.ErrEmptyKey),
		same("large request", large, rpctypes.ErrRequestTooLarge),
		same("duplicate key", twice, rpctypes.ErrDuplicateKey),
		same("unknown lease", lease, rpctypes.ErrLeaseNotFound),
		same("too many operations", ops, rpctypes.ErrTooManyOps),
	)
}
