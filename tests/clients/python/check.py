"""Drives the store with the `etcd3` package: put, get, delete, transaction, watch, lease, users.

It never prints anything on success; the first surprise ends it with a message and status 1.
"""

import os
import queue
import time
from urllib.parse import urlparse

import etcd3
from etcd3.etcdrpc.auth_pb2 import Permission

PREFIX = "client-python/"


def expect(got, want, what):
    if got != want:
        raise SystemExit(f"{what}: got {got!r}, want {want!r}")


def main():
    address = urlparse(os.environ["ENDPOINT"])
    client = etcd3.client(host=address.hostname, port=address.port, timeout=20)
    client.delete_prefix(PREFIX)
    keys(client)
    transactions(client)
    watches(client)
    leases(client)
    cluster(client)
    errors(client)
    if os.environ.get("AUTH"):
        users(client, address)


def keys(client):
    first = client.put(PREFIX + "a", "1").header.revision
    answer = client.put(PREFIX + "a", "2", prev_kv=True)
    expect(answer.header.revision, first + 1, "revision of the second put")
    expect(answer.prev_kv.value, b"1", "previous value")
    client.put(PREFIX + "b", "x")
    value, meta = client.get(PREFIX + "a")
    expect((value, meta.version), (b"2", 2), "value and version")
    expect(meta.create_revision, first, "create revision")
    names = [meta.key for _, meta in client.get_prefix(PREFIX, sort_order="descend")]
    expect(names, [b"client-python/b", b"client-python/a"], "descending list")
    expect(client.get(PREFIX + "none"), (None, None), "a missing key")
    expect(client.delete_prefix(PREFIX).deleted, 2, "keys deleted")


def transactions(client):
    def create():
        return client.transaction(
            compare=[client.transactions.create(PREFIX + "t") == 0],
            success=[client.transactions.put(PREFIX + "t", "first")],
            failure=[client.transactions.get(PREFIX + "t")],
        )

    expect(create()[0], True, "the first create")
    succeeded, answers = create()
    expect(succeeded, False, "the second create")
    expect(answers[0][0][0], b"first", "the value found by the transaction")
    expect(client.replace(PREFIX + "t", "first", "second"), True, "a swap that fits")
    expect(client.replace(PREFIX + "t", "first", "third"), False, "a swap that does not fit")


def watches(client):
    start = client.put(PREFIX + "w", "0").header.revision
    events = queue.Queue()

    def hear(response):
        for event in getattr(response, "events", [response]):
            events.put(event)

    watch = client.add_watch_callback(PREFIX + "w", hear, start_revision=start, prev_kv=True)
    client.put(PREFIX + "w", "1")
    client.delete(PREFIX + "w")
    seen = [events.get(timeout=20) for _ in range(3)]
    kinds = [type(event).__name__ for event in seen]
    expect(kinds, ["PutEvent", "PutEvent", "DeleteEvent"], "kinds of events")
    expect([e.mod_revision - start for e in seen], [0, 1, 2], "revisions of events")
    expect([e.prev_value for e in seen], [b"", b"0", b"1"], "values before")
    client.cancel_watch(watch)


def leases(client):
    lease = client.lease(60)
    client.put(PREFIX + "l", "", lease=lease)
    expect(lease.granted_ttl, 60, "granted time to live")
    expect(list(lease.keys), [b"client-python/l"], "keys of the lease")
    expect(lease.refresh()[0].TTL, 60, "time to live after a keep-alive")
    lease.revoke()
    expect(client.get(PREFIX + "l"), (None, None), "the key after the revocation")
    short = client.lease(2)
    client.put(PREFIX + "s", "x", lease=short)
    deadline = time.monotonic() + 30
    while client.get(PREFIX + "s")[0] is not None:
        if time.monotonic() > deadline:
            raise SystemExit("a lease of 2 s still lives after 30 s")
        time.sleep(0.2)


def cluster(client):
    members = list(client.members)
    expect(len(members), 1, "members")
    status = client.status()
    expect(status.leader.id, members[0].id, "the leader")
    if not status.version or status.db_size <= 0:
        raise SystemExit(f"status: version {status.version!r}, size {status.db_size}")


def errors(client):
    try:
        client.put("", "")
    except Exception as error:  # the package gives this error no class of its own
        if "key is not provided" not in str(error):
            raise SystemExit(f"an empty key gave {error!r}")
        return
    raise SystemExit("an empty key was accepted")


def users(client, address):
    """Leaves the store without users again; the package itself has no calls to make them."""
    rpc = etcd3.etcdrpc
    stub = rpc.AuthStub(client.channel)
    allowed = Permission(permType=Permission.READWRITE, key=PREFIX.encode() + b"u/",
                         range_end=PREFIX.encode() + b"u0")
    stub.RoleAdd(rpc.AuthRoleAddRequest(name="etcd3-role"))
    stub.RoleGrantPermission(rpc.AuthRoleGrantPermissionRequest(name="etcd3-role", perm=allowed))
    for user, role in (("etcd3-user", "etcd3-role"), ("root", "root")):
        stub.UserAdd(rpc.AuthUserAddRequest(name=user, password="secret"))
        stub.UserGrantRole(rpc.AuthUserGrantRoleRequest(user=user, role=role))
    stub.AuthEnable(rpc.AuthEnableRequest())

    def connect(user, password):
        other = etcd3.client(host=address.hostname, port=address.port, timeout=20,
                             user=user, password=password)
        # These need TLS; the token stands in the metadata as well.
        other.call_credentials = None
        return other

    root, user = connect("root", "secret"), connect("etcd3-user", "secret")
    root.put(PREFIX + "other", "1")
    lease = user.lease(60)
    user.put(PREFIX + "u/a", "1", lease=lease)
    expect(user.get(PREFIX + "u/a")[0], b"1", "a key of the user's own")
    succeeded, _ = user.transaction(
        compare=[user.transactions.value(PREFIX + "u/a") == "1"],
        success=[user.transactions.put(PREFIX + "u/b", "2")], failure=[])
    expect(succeeded, True, "a transaction of them")
    expect(list(lease.keys), [b"client-python/u/a"], "the lease on it")
    refused("a read", lambda: user.get(PREFIX + "other"), "permission denied")
    refused("a list", lambda: list(user.get_prefix(PREFIX)), "permission denied")
    refused("a transaction", lambda: user.transaction(
        compare=[user.transactions.version(PREFIX + "other") > 0], success=[], failure=[]),
        "permission denied")
    refused("a call of root's", lambda: user.defragment(), "permission denied")
    refused("nobody's read", lambda: client.get(PREFIX + "u/a"), "user name is empty")
    refused("a wrong password", lambda: connect("root", "wrong"), "authentication failed")
    lease.revoke()
    stub.AuthDisable(rpc.AuthDisableRequest(), metadata=root.metadata)
    for name in ("etcd3-user", "root"):
        stub.UserDelete(rpc.AuthUserDeleteRequest(name=name))
    stub.RoleDelete(rpc.AuthRoleDeleteRequest(role="etcd3-role"))


def refused(what, call, want):
    try:
        call()
    except Exception as error:  # the package has no classes for these errors
        if want not in str(error):
            raise SystemExit(f"{what} gave {error!r}")
    else:
        raise SystemExit(f"{what} was answered")


main()
