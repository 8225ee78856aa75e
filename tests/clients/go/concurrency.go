package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
)

// within is how long anything that has to happen by itself may take.
const within = 20 * time.Second

// sessions: a session lives on a lease of its own, which keeps it alive until it is closed, given up
// or taken away.
func sessions(ctx context.Context, client *clientv3.Client) error {
	other, err := dial()
	if err != nil {
		return err
	}
	defer other.Close()
	session, err := concurrency.NewSession(other, concurrency.WithTTL(2))
	if err != nil {
		return err
	}
	key := prefix + "session"
	if _, err := other.Put(ctx, key, "", clientv3.WithLease(session.Lease())); err != nil {
		return err
	}
	time.Sleep(4 * time.Second)
	alive, err := client.Get(ctx, key)
	if err != nil {
		return err
	}
	// Another client takes the lease away: the session's owner has to notice.
	if _, err := client.Revoke(ctx, session.Lease()); err != nil {
		return err
	}
	if err := closed("a session whose lease was revoked", session.Done()); err != nil {
		return err
	}
	given, err := client.Grant(ctx, 2)
	if err != nil {
		return err
	}
	orphan, err := concurrency.NewSession(client, concurrency.WithLease(given.ID))
	if err != nil {
		return err
	}
	orphan.Orphan()
	if err := closed("an orphaned session", orphan.Done()); err != nil {
		return err
	}
	deadline := time.Now().Add(within)
	for {
		left, err := client.TimeToLive(ctx, given.ID)
		if err != nil {
			return err
		}
		if left.TTL <= 0 {
			break
		}
		if time.Now().After(deadline) {
			return errors.New("the lease of an orphaned session does not end")
		}
		time.Sleep(100 * time.Millisecond)
	}
	return errors.Join(
		same("key of a session after two terms", alive.Count, 1),
		same("lease of a session", alive.Kvs[0].Lease, int64(session.Lease())),
		same("lease that was handed in", orphan.Lease(), given.ID),
	)
}

func closed(what string, done <-chan struct{}) error {
	select {
	case <-done:
		return nil
	case <-time.After(within):
		return fmt.Errorf("%s is not done", what)
	}
}

// tryLocks: a lock that is held cannot be had, its owner can be checked inside a transaction, and a
// waiter whose session ends is told so.
func tryLocks(ctx context.Context, client *clientv3.Client) error {
	other, err := dial()
	if err != nil {
		return err
	}
	defer other.Close()
	first, err := concurrency.NewSession(client)
	if err != nil {
		return err
	}
	defer first.Close()
	second, err := concurrency.NewSession(other)
	if err != nil {
		return err
	}
	name := prefix + "try"
	held, wanted := concurrency.NewMutex(first, name), concurrency.NewMutex(second, name)
	if err := held.TryLock(ctx); err != nil {
		return err
	}
	locked := wanted.TryLock(ctx)
	guarded := func(mutex *concurrency.Mutex, value string) (bool, error) {
		answer, err := client.Txn(ctx).If(mutex.IsOwner()).
			Then(clientv3.OpPut(prefix+"guarded", value)).Commit()
		if err != nil {
			return false, err
		}
		return answer.Succeeded, nil
	}
	mine, err := guarded(held, "1")
	if err != nil {
		return err
	}
	before, err := client.Get(ctx, name+"/", clientv3.WithPrefix())
	if err != nil {
		return err
	}
	oldKey := held.Key()
	waiting := make(chan error, 1)
	go func() { waiting <- wanted.Lock(ctx) }()
	if err := keysBelow(ctx, client, name+"/", 2); err != nil {
		return err
	}
	if _, err := client.Revoke(ctx, second.Lease()); err != nil {
		return err
	}
	if err := keysBelow(ctx, client, name+"/", 1); err != nil {
		return err
	}
	if err := held.Unlock(ctx); err != nil {
		return err
	}
	lost := <-waiting
	twice := held.Unlock(ctx)
	again, err := client.Txn(ctx).
		If(clientv3.Compare(clientv3.CreateRevision(oldKey), "=", held.Header().Revision)).Commit()
	if err != nil {
		return err
	}
	return errors.Join(
		same("a lock that is held", locked, concurrency.ErrLocked),
		same("keys of the lock", len(before.Kvs), 1),
		same("key of the lock", string(before.Kvs[0].Key), oldKey),
		same("revision of the lock", before.Kvs[0].CreateRevision, held.Header().Revision),
		same("the owner's transaction", mine, true),
		same("a waiter without a session", lost, concurrency.ErrSessionExpired),
		same("second release", twice, concurrency.ErrLockReleased),
		same("the owner's key after the release", again.Succeeded, false),
	)
}

// keysBelow waits until so many keys are below the prefix.
func keysBelow(ctx context.Context, client *clientv3.Client, below string, want int64) error {
	deadline := time.Now().Add(within)
	for {
		got, err := client.Get(ctx, below, clientv3.WithPrefix(), clientv3.WithCountOnly())
		if err != nil {
			return err
		}
		if got.Count == want {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%d keys below %s, want %d", got.Count, below, want)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// terms: an observer sees every leader and every proclamation in order; who resigned cannot
// proclaim, and an election can be resumed from its key.
func terms(ctx context.Context, client *clientv3.Client) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	other, err := dial()
	if err != nil {
		return err
	}
	defer other.Close()
	first, err := concurrency.NewSession(client)
	if err != nil {
		return err
	}
	defer first.Close()
	second, err := concurrency.NewSession(other)
	if err != nil {
		return err
	}
	defer second.Close()
	name := prefix + "terms"
	one, two := concurrency.NewElection(first, name), concurrency.NewElection(second, name)
	_, none := two.Leader(ctx)
	observed := concurrency.NewElection(second, name).Observe(ctx)
	if err := one.Campaign(ctx, "one"); err != nil {
		return err
	}
	next := func() (string, error) {
		select {
		case answer, open := <-observed:
			if !open {
				return "", errors.New("the observation ended")
			}
			return string(answer.Kvs[0].Value), nil
		case <-time.After(within):
			return "", errors.New("the observer hears nothing")
		}
	}
	var seen []string
	see := func() error {
		value, err := next()
		seen = append(seen, value)
		return err
	}
	if err := see(); err != nil {
		return err
	}
	if err := one.Proclaim(ctx, "one again"); err != nil {
		return err
	}
	if err := see(); err != nil {
		return err
	}
	resumed := concurrency.ResumeElection(first, name, one.Key(), one.Rev())
	if err := resumed.Proclaim(ctx, "one resumed"); err != nil {
		return err
	}
	if err := see(); err != nil {
		return err
	}
	won := make(chan error, 1)
	go func() { won <- two.Campaign(ctx, "two") }()
	if err := keysBelow(ctx, client, name+"/", 2); err != nil {
		return err
	}
	if err := resumed.Resign(ctx); err != nil {
		return err
	}
	if err := <-won; err != nil {
		return err
	}
	if err := see(); err != nil {
		return err
	}
	return errors.Join(
		same("no leader", none, concurrency.ErrElectionNoLeader),
		same("leaders seen", seen, []string{"one", "one again", "one resumed", "two"}),
		same("proclamation after the term", one.Proclaim(ctx, "x"), concurrency.ErrElectionNotLeader),
		two.Resign(ctx),
	)
}

// memory moves amounts between accounts by software transactional memory, from two clients at once.
func memory(ctx context.Context, client *clientv3.Client) error {
	const accounts, workers, rounds = 4, 4, 10
	other, err := dial()
	if err != nil {
		return err
	}
	defer other.Close()
	account := func(i int) string { return fmt.Sprintf("%sstm/%d", prefix, i) }
	for i := range accounts {
		if _, err := client.Put(ctx, account(i), "100"); err != nil {
			return err
		}
	}
	clients := []*clientv3.Client{client, other}
	failures := make(chan error, workers)
	var group sync.WaitGroup
	for worker := range workers {
		group.Go(func() {
			for round := range rounds {
				from, to := account((worker+round)%accounts), account((worker+round+1)%accounts)
				_, err := concurrency.NewSTM(clients[worker%2], func(stm concurrency.STM) error {
					left, err := strconv.Atoi(stm.Get(from))
					if err != nil {
						return err
					}
					right, err := strconv.Atoi(stm.Get(to))
					if err != nil {
						return err
					}
					stm.Put(from, strconv.Itoa(left-1-worker))
					stm.Put(to, strconv.Itoa(right+1+worker))
					return nil
				}, concurrency.WithAbortContext(ctx))
				if err != nil {
					failures <- err
					return
				}
			}
		})
	}
	group.Wait()
	close(failures)
	if err := <-failures; err != nil {
		return err
	}
	all, err := client.Get(ctx, prefix+"stm/", clientv3.WithPrefix())
	if err != nil {
		return err
	}
	total := 0
	var writes int64
	for _, kv := range all.Kvs {
		amount, err := strconv.Atoi(string(kv.Value))
		if err != nil {
			return err
		}
		total += amount
		writes += kv.Version - 1
	}
	return errors.Join(
		same("sum of the accounts", total, accounts*100),
		same("writes", writes, 2*workers*rounds),
		conflicts(ctx, client, other),
	)
}

// conflicts lets another client write what a transaction has read, before it commits. The levels
// differ in whether the transaction has to begin again.
func conflicts(ctx context.Context, client, other *clientv3.Client) error {
	read, written := prefix+"stm/read", prefix+"stm/written"
	levels := []struct {
		level    concurrency.Isolation
		attempts int
		value    string
	}{
		{concurrency.SerializableSnapshot, 2, "new"},
		{concurrency.Serializable, 2, "new"},
		{concurrency.RepeatableReads, 2, "new"},
		{concurrency.ReadCommitted, 1, "old"},
	}
	for _, want := range levels {
		if _, err := client.Put(ctx, read, "old"); err != nil {
			return err
		}
		attempts := 0
		_, err := concurrency.NewSTM(client, func(stm concurrency.STM) error {
			attempts++
			value := stm.Get(read)
			if attempts == 1 {
				if _, err := other.Put(ctx, read, "new"); err != nil {
					return err
				}
			}
			stm.Put(written, value)
			return nil
		}, concurrency.WithIsolation(want.level), concurrency.WithAbortContext(ctx))
		if err != nil {
			return err
		}
		got, err := other.Get(ctx, written)
		if err != nil {
			return err
		}
		if err := errors.Join(
			same(fmt.Sprintf("attempts at level %d", want.level), attempts, want.attempts),
			same(fmt.Sprintf("value at level %d", want.level), string(got.Kvs[0].Value), want.value),
		); err != nil {
			return err
		}
	}
	return writeConflict(ctx, client, other)
}

// writeConflict: at the strictest level a write to a key that was only written counts as well, and
// what a failed function did leaves no trace.
func writeConflict(ctx context.Context, client, other *clientv3.Client) error {
	key := prefix + "stm/blind"
	attempts := 0
	answer, err := concurrency.NewSTM(client, func(stm concurrency.STM) error {
		attempts++
		revision := stm.Rev(prefix + "stm/read")
		if attempts == 1 {
			if _, err := other.Put(ctx, key, "other"); err != nil {
				return err
			}
		}
		stm.Del(prefix + "stm/written")
		stm.Put(key, strconv.FormatInt(revision, 10))
		return nil
	}, concurrency.WithIsolation(concurrency.SerializableSnapshot),
		concurrency.WithPrefetch(prefix+"stm/read"), concurrency.WithAbortContext(ctx))
	if err != nil {
		return err
	}
	refusal := errors.New("the function refuses")
	_, refused := concurrency.NewSTM(client, func(stm concurrency.STM) error {
		stm.Put(key, "never")
		return refusal
	})
	after, err := client.Get(ctx, prefix+"stm/", clientv3.WithPrefix())
	if err != nil {
		return err
	}
	found := map[string]string{}
	for _, kv := range after.Kvs {
		found[string(kv.Key)] = string(kv.Value)
	}
	source, err := client.Get(ctx, prefix+"stm/read")
	if err != nil {
		return err
	}
	_, kept := found[prefix+"stm/written"]
	return errors.Join(
		same("attempts of a blind write", attempts, 2),
		same("committed", answer.Succeeded, true),
		same("revision of what was read", found[key], source.Kvs[0].ModRevision),
		same("deleted key", kept, false),
		same("a function that fails", refused, refusal),
	)
}
