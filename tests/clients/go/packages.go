package main

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	"go.etcd.io/etcd/client/v3/leasing"
	"go.etcd.io/etcd/client/v3/mirror"
	"go.etcd.io/etcd/client/v3/namespace"
	"go.etcd.io/etcd/client/v3/ordering"
)

// leasedReads: a client that owns a key answers reads from its cache, and gives the key up before
// anybody else's write gets through.
func leasedReads(ctx context.Context, client *clientv3.Client) error {
	other, err := dial()
	if err != nil {
		return err
	}
	defer other.Close()
	owners, data := prefix+"leasing/", prefix+"leased/"
	mine, closeMine, err := leasing.NewKV(client, owners)
	if err != nil {
		return err
	}
	defer closeMine()
	theirs, closeTheirs, err := leasing.NewKV(other, owners)
	if err != nil {
		return err
	}
	defer closeTheirs()
	key := data + "a"
	value := func(kv clientv3.KV, options ...clientv3.OpOption) string {
		answer, err := kv.Get(ctx, key, options...)
		if err != nil {
			return err.Error()
		}
		if len(answer.Kvs) == 0 {
			return "nothing"
		}
		return string(answer.Kvs[0].Value)
	}
	if _, err := client.Put(ctx, key, "1"); err != nil {
		return err
	}
	first := value(mine)
	owned, err := client.Get(ctx, owners+key)
	if err != nil {
		return err
	}
	if len(owned.Kvs) != 1 {
		return fmt.Errorf("%d keys of ownership after a read", len(owned.Kvs))
	}
	// A write past the package shows that the owner does not ask the store.
	if _, err := client.Put(ctx, key, "past the package"); err != nil {
		return err
	}
	cached := value(mine)
	if _, err := theirs.Put(ctx, key, "2"); err != nil {
		return err
	}
	second := value(mine)
	swap, err := theirs.Txn(ctx).
		If(clientv3.Compare(clientv3.Value(key), "=", "2")).
		Then(clientv3.OpPut(key, "3"), clientv3.OpGet(key)).
		Else(clientv3.OpGet(key)).Commit()
	if err != nil {
		return err
	}
	third := value(mine)
	own, err := mine.Txn(ctx).If(clientv3.Compare(clientv3.Version(key), ">", 0)).
		Then(clientv3.OpPut(key, "4")).Commit()
	if err != nil {
		return err
	}
	fourth := value(theirs)
	gone, err := theirs.Delete(ctx, data, clientv3.WithPrefix())
	if err != nil {
		return err
	}
	after := value(mine)
	if err := deadOwner(ctx, theirs, owners, data+"dead"); err != nil {
		return err
	}
	return errors.Join(
		same("first read", first, "1"),
		same("lease of the ownership", owned.Kvs[0].Lease != 0, true),
		same("cached read", cached, "1"),
		same("read after another client's write", second, "2"),
		same("another client's transaction", swap.Succeeded, true),
		same("read inside it", string(swap.Responses[1].GetResponseRange().Kvs[0].Value), "3"),
		same("read after it", third, "3"),
		same("the owner's transaction", own.Succeeded, true),
		same("another client's read", fourth, "4"),
		same("deleted", gone.Deleted, 1),
		same("read after the deletion", after, "nothing"),
	)
}

// deadOwner: an owner that went without a word blocks a writer for no longer than its lease.
func deadOwner(ctx context.Context, writer clientv3.KV, owners, key string) error {
	if _, err := writer.Put(ctx, key, "5"); err != nil {
		return err
	}
	gone, err := dial()
	if err != nil {
		return err
	}
	owner, closeOwner, err := leasing.NewKV(gone, owners, concurrency.WithTTL(2))
	if err != nil {
		return err
	}
	held, err := owner.Get(ctx, key)
	if err != nil {
		return err
	}
	if err := gone.Close(); err != nil {
		return err
	}
	closeOwner()
	writing, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	begin := time.Now()
	if _, err := writer.Put(writing, key, "6"); err != nil {
		return fmt.Errorf("write after its owner went: %w", err)
	}
	return errors.Join(
		same("the owner's read", string(held.Kvs[0].Value), "5"),
		same("the writer waited", time.Since(begin) > 500*time.Millisecond, true),
	)
}

// mirrored copies a prefix with the syncer, in its batches of a thousand, and follows what a second
// client changes; in the end copy and original are the same.
func mirrored(ctx context.Context, client *clientv3.Client) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	other, err := dial()
	if err != nil {
		return err
	}
	defer other.Close()
	below := prefix + "mirror/"
	const base = 2500
	for start := 0; start < base; start += 100 {
		var puts []clientv3.Op
		for i := start; i < start+100; i++ {
			puts = append(puts, clientv3.OpPut(fmt.Sprintf("%s%05d", below, i), fmt.Sprint(i)))
		}
		if _, err := client.Txn(ctx).Then(puts...).Commit(); err != nil {
			return err
		}
	}
	syncer := mirror.NewSyncer(other, below, 0)
	answers, failures := syncer.SyncBase(ctx)
	copied := map[string]string{}
	batches := 0
	written := false
	for answer := range answers {
		// What changes while the base is read belongs to the updates.
		if !written {
			written = true
			if _, err := client.Put(ctx, below+"99999", "late"); err != nil {
				return err
			}
		}
		batches++
		for _, kv := range answer.Kvs {
			copied[string(kv.Key)] = string(kv.Value)
		}
	}
	if err := <-failures; err != nil {
		return err
	}
	inBase := len(copied)
	updates := syncer.SyncUpdates(ctx)
	if _, err := client.Put(ctx, below+"00000", "changed"); err != nil {
		return err
	}
	if _, err := client.Delete(ctx, below+"00001", clientv3.WithRange(below+"00011")); err != nil {
		return err
	}
	if _, err := client.Put(ctx, prefix+"elsewhere", "x"); err != nil {
		return err
	}
	end, err := client.Put(ctx, below+"end", "")
	if err != nil {
		return err
	}
	for last := int64(0); last < end.Header.Revision; {
		answer, open := <-updates
		if !open || answer.Err() != nil {
			return fmt.Errorf("the updates ended: %v", answer.Err())
		}
		for _, event := range answer.Events {
			last = event.Kv.ModRevision
			if event.Type == clientv3.EventTypeDelete {
				delete(copied, string(event.Kv.Key))
			} else {
				copied[string(event.Kv.Key)] = string(event.Kv.Value)
			}
		}
	}
	original, err := client.Get(ctx, below, clientv3.WithPrefix(),
		clientv3.WithRev(end.Header.Revision))
	if err != nil {
		return err
	}
	want := map[string]string{}
	for _, kv := range original.Kvs {
		want[string(kv.Key)] = string(kv.Value)
	}
	_, err = client.Delete(ctx, below, clientv3.WithPrefix())
	return errors.Join(err,
		same("keys of the base", inBase, base),
		same("more than one batch", batches > 1, true),
		same("keys of the copy", len(copied), base+2-10),
		same("the copy", copied, want),
	)
}

// namespaces: everything behind a namespace, up to the keys of a lease and of events, is named
// without it, and nothing outside can be reached.
func namespaces(ctx context.Context, client *clientv3.Client) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	other, err := dial()
	if err != nil {
		return err
	}
	defer other.Close()
	space := prefix + "space/"
	kv := namespace.NewKV(other.KV, space)
	watcher := namespace.NewWatcher(other.Watcher, space)
	leases := namespace.NewLease(other.Lease, space)
	events := watcher.Watch(ctx, "", clientv3.WithPrefix(), clientv3.WithPrevKV(),
		clientv3.WithCreatedNotify())
	if created := <-events; !created.Created {
		return fmt.Errorf("the watch began with %v", created)
	}
	lease, err := leases.Grant(ctx, 60)
	if err != nil {
		return err
	}
	if _, err := kv.Put(ctx, "a", "1", clientv3.WithLease(lease.ID)); err != nil {
		return err
	}
	if _, err := client.Put(ctx, prefix+"outside", "", clientv3.WithLease(lease.ID)); err != nil {
		return err
	}
	put, err := kv.Put(ctx, "a", "2", clientv3.WithPrevKV(), clientv3.WithLease(lease.ID))
	if err != nil {
		return err
	}
	outside, err := client.Get(ctx, space+"a")
	if err != nil {
		return err
	}
	txn, err := kv.Txn(ctx).If(clientv3.Compare(clientv3.Value("a"), "=", "2")).
		Then(clientv3.OpPut("b", "x"), clientv3.OpTxn(nil, []clientv3.Op{clientv3.OpGet("a")}, nil)).
		Commit()
	if err != nil {
		return err
	}
	inner := txn.Responses[1].GetResponseTxn().Responses[0].GetResponseRange()
	all, err := kv.Get(ctx, "", clientv3.WithFromKey())
	if err != nil {
		return err
	}
	left, err := leases.TimeToLive(ctx, lease.ID, clientv3.WithAttachedKeys())
	if err != nil {
		return err
	}
	_, empty := kv.Put(ctx, "", "")
	gone, err := kv.Delete(ctx, "", clientv3.WithFromKey(), clientv3.WithPrevKV())
	if err != nil {
		return err
	}
	seen, err := hear(events, 5)
	if err != nil {
		return err
	}
	var story []string
	for _, event := range seen {
		before := "-"
		if event.PrevKv != nil {
			before = string(event.PrevKv.Key) + "=" + string(event.PrevKv.Value)
		}
		story = append(story, fmt.Sprintf("%v %s %s", event.Type, event.Kv.Key, before))
	}
	survivor, err := client.Get(ctx, prefix+"outside")
	if err != nil {
		return err
	}
	_, err = client.Revoke(ctx, lease.ID)
	return errors.Join(err,
		same("previous key", string(put.PrevKv.Key), "a"),
		same("value seen outside", string(outside.Kvs[0].Value), "2"),
		same("transaction", txn.Succeeded, true),
		same("key read inside it", string(inner.Kvs[0].Key), "a"),
		same("keys from the first", all.Count, 2),
		same("keys of the lease", fmt.Sprintf("%s", left.Keys), "[a]"),
		same("an empty key is refused", empty != nil, true),
		same("deleted", gone.Deleted, 2),
		same("first deleted key", string(gone.PrevKvs[0].Key), "a"),
		same("events", story, []string{"PUT a -", "PUT a a=1", "PUT b -", "DELETE a a=2", "DELETE b b=x"}),
		same("a key outside", survivor.Count, 1),
	)
}

// ordered: revisions that one client sees never go back. While another client writes, the store's
// own answers have to keep that, and an answer from the past has to be noticed.
func ordered(ctx context.Context, client *clientv3.Client) error {
	other, err := dial()
	if err != nil {
		return err
	}
	defer other.Close()
	key := prefix + "ordered"
	past, err := client.Put(ctx, key, "past")
	if err != nil {
		return err
	}
	old, err := client.Get(ctx, key)
	if err != nil {
		return err
	}
	var violations atomic.Int32
	source := &rewind{KV: other.KV}
	kv := ordering.NewKV(source, func(clientv3.Op, clientv3.OpResponse, int64) error {
		violations.Add(1)
		return nil
	})
	stop, done := make(chan struct{}), make(chan error, 1)
	go func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				done <- nil
				return
			default:
			}
			if _, err := client.Put(ctx, key, fmt.Sprint(i)); err != nil {
				done <- err
				return
			}
		}
	}()
	last := past.Header.Revision
	advanced := 0
	until := time.Now().Add(time.Second)
	for i := 0; time.Now().Before(until) || advanced < 3; i++ {
		var revision int64
		if i%2 == 0 {
			answer, err := kv.Get(ctx, key, clientv3.WithSerializable())
			if err != nil {
				return err
			}
			revision = answer.Header.Revision
		} else {
			answer, err := kv.Txn(ctx).Then(clientv3.OpGet(key, clientv3.WithSerializable())).Commit()
			if err != nil {
				return err
			}
			revision = answer.Header.Revision
		}
		if revision < last {
			return fmt.Errorf("revision %d after %d", revision, last)
		}
		if revision > last {
			advanced++
		}
		last = revision
	}
	close(stop)
	if err := <-done; err != nil {
		return err
	}
	honest := violations.Load()
	source.stale.Store(old)
	fresh, err := kv.Get(ctx, key)
	if err != nil {
		return err
	}
	return errors.Join(
		same("violations by the store", honest, 0),
		same("violations by an answer from the past", violations.Load(), 1),
		same("the answer after it is no older", fresh.Header.Revision >= last, true),
	)
}

// rewind gives one answer of the past in the place of the next read.
type rewind struct {
	clientv3.KV
	stale atomic.Pointer[clientv3.GetResponse]
}

func (r *rewind) Do(ctx context.Context, op clientv3.Op) (clientv3.OpResponse, error) {
	if old := r.stale.Swap(nil); old != nil {
		return old.OpResponse(), nil
	}
	return r.KV.Do(ctx, op)
}
