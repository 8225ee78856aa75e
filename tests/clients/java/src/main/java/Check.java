import static java.nio.charset.StandardCharsets.UTF_8;

import io.etcd.jetcd.ByteSequence;
import io.etcd.jetcd.Client;
import io.etcd.jetcd.Election;
import io.etcd.jetcd.KeyValue;
import io.etcd.jetcd.auth.Permission;
import io.etcd.jetcd.election.CampaignResponse;
import io.etcd.jetcd.election.LeaderResponse;
import io.etcd.jetcd.election.NoLeaderException;
import io.etcd.jetcd.election.NotLeaderException;
import io.etcd.jetcd.lease.LeaseKeepAliveResponse;
import io.etcd.jetcd.op.Cmp;
import io.etcd.jetcd.op.CmpTarget;
import io.etcd.jetcd.op.Op;
import io.etcd.jetcd.options.DeleteOption;
import io.etcd.jetcd.options.GetOption;
import io.etcd.jetcd.options.LeaseOption;
import io.etcd.jetcd.options.PutOption;
import io.etcd.jetcd.options.WatchOption;
import io.etcd.jetcd.support.CloseableClient;
import io.etcd.jetcd.watch.WatchEvent;
import io.grpc.stub.StreamObserver;
import java.util.ArrayList;
import java.util.List;
import java.util.Objects;
import java.util.concurrent.BlockingQueue;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.LinkedBlockingQueue;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.TimeoutException;

/**
 * Drives the store with jetcd: put, get, delete, transaction, watch, lease, lock and election. It
 * never prints anything on success; the first surprise ends it with a message and status 1.
 */
public final class Check {
    private static final String PREFIX = "client-java/";
    private static final long PATIENCE_SECONDS = 20;

    public static void main(String[] args) {
        String endpoint = System.getenv("ENDPOINT");
        try (Client client = connect(endpoint); Client other = connect(endpoint)) {
            done(client.getKVClient().delete(bytes(PREFIX), everything()));
            keys(client);
            transactions(client);
            watches(client, other);
            leases(client);
            refusals(client);
            locks(client, other);
            elections(client, other);
            if (System.getenv("AUTH") != null) {
                users(client, endpoint);
            }
        } catch (Exception | AssertionError failure) {
            failure.printStackTrace();
            System.exit(1);
        }
        System.exit(0);
    }

    private static Client connect(String endpoint) {
        return Client.builder().endpoints(endpoint).build();
    }

    private static void keys(Client client) throws Exception {
        var kv = client.getKVClient();
        long first = done(kv.put(bytes(PREFIX + "a"), bytes("1"))).getHeader().getRevision();
        var put = done(kv.put(bytes(PREFIX + "a"), bytes("2"),
                PutOption.builder().withPrevKV().build()));
        same("revision of the second put", put.getHeader().getRevision(), first + 1);
        same("previous value", put.getPrevKv().getValue(), bytes("1"));
        done(kv.put(bytes(PREFIX + "b"), bytes("x")));
        var list = done(kv.get(bytes(PREFIX), GetOption.builder().isPrefix(true).withLimit(1)
                .withSortField(GetOption.SortTarget.KEY)
                .withSortOrder(GetOption.SortOrder.DESCEND).build()));
        same("count of a limited list", list.getCount(), 2L);
        same("more in a limited list", list.isMore(), true);
        same("first key descending", list.getKvs().get(0).getKey(), bytes(PREFIX + "b"));
        var old = done(kv.get(bytes(PREFIX + "a"), GetOption.builder().withRevision(first).build()));
        same("old value", old.getKvs().get(0).getValue(), bytes("1"));
        var gone = done(kv.delete(bytes(PREFIX),
                DeleteOption.builder().isPrefix(true).withPrevKV(true).build()));
        same("deleted", gone.getDeleted(), 2L);
        same("deleted pairs", gone.getPrevKvs().size(), 2);
    }

    private static void transactions(Client client) throws Exception {
        var kv = client.getKVClient();
        ByteSequence key = bytes(PREFIX + "t");
        var absent = new Cmp(key, Cmp.Op.EQUAL, CmpTarget.createRevision(0));
        Op create = Op.put(key, bytes("first"), PutOption.DEFAULT);
        Op read = Op.get(key, GetOption.DEFAULT);
        same("first create", done(kv.txn().If(absent).Then(create).Else(read).commit()).isSucceeded(),
                true);
        var second = done(kv.txn().If(absent).Then(create).Else(read).commit());
        same("second create", second.isSucceeded(), false);
        same("value found", second.getGetResponses().get(0).getKvs().get(0).getValue(),
                bytes("first"));
        var several = done(kv.txn()
                .If(new Cmp(key, Cmp.Op.EQUAL, CmpTarget.value(bytes("first"))),
                        new Cmp(key, Cmp.Op.GREATER, CmpTarget.version(0)))
                .Then(Op.put(bytes(PREFIX + "u"), bytes("1"), PutOption.DEFAULT),
                        Op.delete(key, DeleteOption.DEFAULT))
                .commit());
        same("several operations", several.isSucceeded(), true);
        same("deleted inside", several.getDeleteResponses().get(0).getDeleted(), 1L);
        same("one revision", several.getHeader().getRevision(), second.getHeader().getRevision() + 1);
    }

    private static void watches(Client client, Client other) throws Exception {
        var kv = client.getKVClient();
        ByteSequence key = bytes(PREFIX + "w");
        long from = done(kv.put(key, bytes("0"))).getHeader().getRevision();
        BlockingQueue<WatchEvent> events = new LinkedBlockingQueue<>();
        BlockingQueue<Throwable> failures = new LinkedBlockingQueue<>();
        var option = WatchOption.builder().withRevision(from).withPrevKV(true).build();
        var watch = other.getWatchClient().watch(key, option,
                response -> events.addAll(response.getEvents()), failures::add);
        try (watch) {
            done(kv.put(key, bytes("1")));
            done(kv.delete(key));
            List<String> seen = new ArrayList<>();
            for (int i = 0; i < 3; i++) {
                WatchEvent event = next(events);
                seen.add(event.getEventType() + " " + (event.getKeyValue().getModRevision() - from)
                        + " " + event.getKeyValue().getValue() + " " + event.getPrevKV().getValue());
            }
            same("events", seen, List.of("PUT 0 0 ", "PUT 1 1 0", "DELETE 2  1"));
        }
        same("failures of the watch", failures.size(), 0);
        // One that begins before the compaction is told so.
        long last = done(kv.put(key, bytes("2"))).getHeader().getRevision();
        done(kv.compact(last));
        var past = other.getWatchClient().watch(key,
                WatchOption.builder().withRevision(from).build(), response -> { }, failures::add);
        try (past) {
            Throwable failure = next(failures);
            contains("watch below the compaction", failure, "compacted");
        }
    }

    private static void leases(Client client) throws Exception {
        var kv = client.getKVClient();
        var leases = client.getLeaseClient();
        ByteSequence key = bytes(PREFIX + "l");
        long lease = done(leases.grant(2)).getID();
        done(kv.put(key, bytes("x"), PutOption.builder().withLeaseId(lease).build()));
        BlockingQueue<LeaseKeepAliveResponse> kept = new LinkedBlockingQueue<>();
        CloseableClient keeper = leases.keepAlive(lease, new StreamObserver<>() {
            @Override
            public void onNext(LeaseKeepAliveResponse response) {
                kept.add(response);
            }

            @Override
            public void onError(Throwable failure) { }

            @Override
            public void onCompleted() { }
        });
        Thread.sleep(4000);
        same("time to live after a keep-alive", next(kept).getTTL(), 2L);
        var left = done(leases.timeToLive(lease, LeaseOption.builder().withAttachedKeys().build()));
        same("granted", left.getGrantedTTL(), 2L);
        same("keys of the lease", left.getKeys(), List.of(key));
        keeper.close();
        gone(client, key);
        long revoked = done(leases.grant(60)).getID();
        done(kv.put(key, bytes("x"), PutOption.builder().withLeaseId(revoked).build()));
        same("once", done(leases.keepAliveOnce(revoked)).getTTL(), 60L);
        done(leases.revoke(revoked));
        same("key after the revocation", done(kv.get(key)).getCount(), 0L);
    }

    /** Waits until the key is no more, which has to happen by itself. */
    private static void gone(Client client, ByteSequence key) throws Exception {
        long end = System.nanoTime() + TimeUnit.SECONDS.toNanos(PATIENCE_SECONDS);
        while (done(client.getKVClient().get(key)).getCount() > 0) {
            same(key + " lives on", System.nanoTime() < end, true);
            Thread.sleep(100);
        }
    }

    private static void refusals(Client client) throws Exception {
        var kv = client.getKVClient();
        contains("an empty key", refusal(kv.put(bytes(""), bytes(""))), "key is not provided");
        contains("an unknown lease",
                refusal(kv.put(bytes(PREFIX + "d"), bytes(""),
                        PutOption.builder().withLeaseId(12345).build())),
                "requested lease not found");
        contains("a revision of the future",
                refusal(kv.get(bytes(PREFIX), GetOption.builder().withRevision(1L << 40).build())),
                "required revision is a future revision");
    }

    /** A lock is the server's service: the second client waits for the first one's release. */
    private static void locks(Client client, Client other) throws Exception {
        ByteSequence name = bytes(PREFIX + "lock");
        long first = done(client.getLeaseClient().grant(30)).getID();
        long second = done(other.getLeaseClient().grant(30)).getID();
        ByteSequence held = done(client.getLockClient().lock(name, first)).getKey();
        same("key of the lock", held.startsWith(bytes(PREFIX + "lock/")), true);
        same("lock a second time", done(client.getLockClient().lock(name, first)).getKey(), held);
        KeyValue owner = done(client.getKVClient().get(held)).getKvs().get(0);
        same("lease of the lock", owner.getLease(), first);
        var waiting = other.getLockClient().lock(name, second);
        waits("a lock that is held", waiting);
        done(client.getLockClient().unlock(held));
        ByteSequence next = done(waiting).getKey();
        same("keys of the lock", count(client, PREFIX + "lock/"), 1L);
        var third = client.getLockClient().lock(name, first);
        waits("a lock that is held again", third);
        // The end of its lease ends the ownership.
        done(other.getLeaseClient().revoke(second));
        ByteSequence last = done(third).getKey();
        same("the next owner's key", last.equals(next), false);
        done(client.getLockClient().unlock(last));
        done(client.getLeaseClient().revoke(first));
        contains("a lock under no lease", refusal(client.getLockClient().lock(name, first)),
                "requested lease not found");
    }

    private static void elections(Client client, Client other) throws Exception {
        ByteSequence name = bytes(PREFIX + "election");
        long first = done(client.getLeaseClient().grant(30)).getID();
        long second = done(other.getLeaseClient().grant(30)).getID();
        same("no leader",
                refusal(client.getElectionClient().leader(name)) instanceof NoLeaderException, true);
        BlockingQueue<String> leaders = new LinkedBlockingQueue<>();
        other.getElectionClient().observe(name, new Election.Listener() {
            @Override
            public void onNext(LeaderResponse response) {
                leaders.add(response.getKv().getValue().toString());
            }

            @Override
            public void onError(Throwable failure) {
                leaders.add(failure.toString());
            }

            @Override
            public void onCompleted() { }
        });
        CampaignResponse won = done(client.getElectionClient().campaign(name, first, bytes("one")));
        same("name of the election", won.getLeader().getName(), name);
        same("lease of the leader", won.getLeader().getLease(), first);
        same("observed", next(leaders), "one");
        var waiting = other.getElectionClient().campaign(name, second, bytes("two"));
        waits("a second candidate", waiting);
        done(client.getElectionClient().proclaim(won.getLeader(), bytes("one again")));
        same("observed", next(leaders), "one again");
        same("leader", done(other.getElectionClient().leader(name)).getKv().getValue(),
                bytes("one again"));
        done(client.getElectionClient().resign(won.getLeader()));
        var next = done(waiting).getLeader();
        same("observed", next(leaders), "two");
        var late = client.getElectionClient().proclaim(won.getLeader(), bytes("late"));
        same("proclamation after the term", refusal(late) instanceof NotLeaderException, true);
        done(other.getElectionClient().resign(next));
        done(client.getLeaseClient().revoke(first));
        done(other.getLeaseClient().revoke(second));
        same("keys of the election", count(client, PREFIX + "election/"), 0L);
    }

    /** Leaves the store without users again, whatever it finds. */
    private static void users(Client client, String endpoint) throws Exception {
        var auth = client.getAuthClient();
        ByteSequence own = bytes(PREFIX + "own/");
        ByteSequence ownEnd = bytes(PREFIX + "own0");
        ByteSequence role = bytes("java-writer");
        ByteSequence name = bytes("java-user");
        ByteSequence root = bytes("root");
        done(auth.roleAdd(role));
        done(auth.roleGrantPermission(role, own, ownEnd, Permission.Type.READWRITE));
        done(auth.userAdd(name, bytes("pw")));
        done(auth.userGrantRole(name, role));
        done(auth.userAdd(root, bytes("secret")));
        done(auth.userGrantRole(root, root));
        done(auth.authEnable());
        try (Client admin = as(endpoint, root, "secret"); Client user = as(endpoint, name, "pw");
                Client wrong = as(endpoint, name, "wrong")) {
            ByteSequence key = bytes(PREFIX + "own/a");
            done(user.getKVClient().put(key, bytes("1")));
            same("permitted read", done(user.getKVClient().get(key)).getCount(), 1L);
            contains("write outside", refusal(user.getKVClient().put(bytes(PREFIX), bytes(""))),
                    "permission denied");
            contains("without a name", refusal(client.getKVClient().get(key)), "user name is empty");
            contains("a wrong password", refusal(wrong.getKVClient().get(key)), "UNAUTHENTICATED");
            same("users", done(admin.getAuthClient().userList()).getUsers(),
                    List.of("java-user", "root"));
            done(admin.getAuthClient().authDisable());
        }
        done(auth.userDelete(name));
        done(auth.userDelete(root));
        done(auth.roleDelete(role));
    }

    private static Client as(String endpoint, ByteSequence name, String password) {
        return Client.builder().endpoints(endpoint).user(name).password(bytes(password)).build();
    }

    private static DeleteOption everything() {
        return DeleteOption.builder().isPrefix(true).build();
    }

    private static long count(Client client, String prefix) throws Exception {
        var option = GetOption.builder().isPrefix(true).withCountOnly(true).build();
        return done(client.getKVClient().get(bytes(prefix), option)).getCount();
    }

    private static ByteSequence bytes(String text) {
        return ByteSequence.from(text, UTF_8);
    }

    private static <T> T done(CompletableFuture<T> work) throws Exception {
        return work.get(PATIENCE_SECONDS, TimeUnit.SECONDS);
    }

    private static <T> T next(BlockingQueue<T> queue) throws InterruptedException {
        T item = queue.poll(PATIENCE_SECONDS, TimeUnit.SECONDS);
        same("something to hear of", item != null, true);
        return item;
    }

    private static Throwable refusal(CompletableFuture<?> work) throws Exception {
        try {
            Object answer = done(work);
            throw new AssertionError("accepted, with " + answer);
        } catch (ExecutionException failure) {
            return failure.getCause();
        }
    }

    private static void waits(String what, CompletableFuture<?> work) throws Exception {
        try {
            Object answer = work.get(500, TimeUnit.MILLISECONDS);
            throw new AssertionError(what + " was given: " + answer);
        } catch (TimeoutException expected) {
            // It is to wait until we let go.
        }
    }

    private static void contains(String what, Throwable failure, String text) {
        if (!String.valueOf(failure.getMessage()).contains(text)) {
            throw new AssertionError(what + ": " + failure, failure);
        }
    }

    private static void same(String what, Object got, Object want) {
        if (!Objects.equals(got, want)) {
            throw new AssertionError(what + ": got " + got + ", want " + want);
        }
    }
}
