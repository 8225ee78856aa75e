"""Drives the store with the `aetcd` package: put, get, delete, transaction, watch, lease, lock, members.

It never prints anything on success; the first surprise ends it with a message and status 1.
"""

import asyncio
import io
import os
from urllib.parse import urlparse

import aetcd

PREFIX = b"client-aetcd/"
ADDRESS = urlparse(os.environ["ENDPOINT"])


def expect(got, want, what):
    if got != want:
        raise SystemExit(f"{what}: got {got!r}, want {want!r}")


def connect(**options):
    return aetcd.Client(host=ADDRESS.hostname, port=ADDRESS.port, timeout=20, **options)


async def main():
    async with connect() as client, connect() as other:
        await client.delete_prefix(PREFIX)
        await keys(client)
        await transactions(client)
        await watches(client, other)
        await leases(client)
        await locks(client, other)
        await cluster(client)
        if os.environ.get("AUTH"):
            await users(client)


async def keys(client):
    first = (await client.put(PREFIX + b"a", b"1")).header.revision
    put = await client.put(PREFIX + b"a", b"2", prev_kv=True)
    expect(put.header.revision, first + 1, "revision of the second put")
    expect(put.prev_kv.value, b"1", "previous value")
    await client.put(PREFIX + b"b", b"x")
    got = await client.get(PREFIX + b"a")
    expect((got.value, got.version, got.create_revision), (b"2", 2, first), "the key")
    listed = await client.get_prefix(PREFIX, sort_order="descend", keys_only=True)
    expect([(kv.key, kv.value) for kv in listed],
           [(PREFIX + b"b", b""), (PREFIX + b"a", b"")], "descending list of keys")
    ranged = await client.get_range(PREFIX + b"a", PREFIX + b"b")
    expect((ranged.count, ranged.more, len(ranged)), (1, False, 1), "a range")
    expect(await client.get(PREFIX + b"none"), None, "a missing key")
    gone = await client.delete_prefix(PREFIX, prev_kv=True)
    expect((gone.deleted, [kv.value for kv in gone]), (2, [b"2", b"x"]), "deleted pairs")
    try:
        await client.put(b"", b"")
    except aetcd.InvalidArgumentError as error:
        expect(str(error), "etcdserver: key is not provided", "an empty key")
    else:
        raise SystemExit("an empty key was accepted")


async def transactions(client):
    tx = client.transactions

    async def create():
        return await client.transaction(
            compare=[tx.create(PREFIX + b"t") == 0],
            success=[tx.put(PREFIX + b"t", b"first")],
            failure=[tx.get(PREFIX + b"t")],
        )

    expect((await create())[0], True, "the first create")
    succeeded, answers = await create()
    expect((succeeded, answers[0][0][0]), (False, b"first"), "the second create")
    expect(await client.replace(PREFIX + b"t", b"first", b"second"), True, "a swap that fits")
    expect(await client.replace(PREFIX + b"t", b"first", b"third"), False, "a swap that does not")


async def watches(client, other):
    start = (await client.put(PREFIX + b"w/a", b"0")).header.revision
    watch = await other.watch_prefix(PREFIX + b"w/", start_revision=start, prev_kv=True)
    puts = await other.watch(PREFIX + b"w/a", start_revision=start, kind=aetcd.EventKind.PUT)
    await client.put(PREFIX + b"w/a", b"1")
    await client.delete(PREFIX + b"w/a")
    await client.put(PREFIX + b"w/b", b"x")
    seen = []
    async with asyncio.timeout(20):
        async for event in watch:
            before = event.prev_kv.value if event.prev_kv and event.prev_kv.key else None
            seen.append((event.kind, event.kv.mod_revision - start, before))
            if len(seen) == 4:
                break
    # The filter of the package names what to hear of.
    kinds = []
    async with asyncio.timeout(20):
        async for event in puts:
            kinds.append((event.kind, event.kv.value))
            if len(kinds) == 2:
                break
    want = [("PUT", 0, None), ("PUT", 1, b"0"), ("DELETE", 2, b"1"), ("PUT", 3, None)]
    expect(seen, want, "events")
    expect(kinds, [("PUT", b"0"), ("PUT", b"1")], "events behind the filter")
    await watch.cancel()
    await puts.cancel()
    last = (await client.put(PREFIX + b"w/a", b"2")).header.revision
    await client.compact(last)
    try:
        past = await other.watch(PREFIX + b"w/a", start_revision=start)
        async with asyncio.timeout(20):
            async for event in past:
                raise SystemExit(f"a watch below the compaction heard {event}")
    except aetcd.RevisionCompactedError as error:
        expect(error.compacted_revision, last, "compacted revision")
    else:
        raise SystemExit("a watch below the compaction ended without a word")


async def leases(client):
    lease = await client.lease(60)
    await client.put(PREFIX + b"l", b"", lease=lease)
    expect(await lease.granted_ttl(), 60, "granted time to live")
    expect(list(await lease.keys()), [PREFIX + b"l"], "keys of the lease")
    expect((await lease.refresh()).TTL, 60, "time to live after a keep-alive")
    await lease.revoke()
    expect(await client.get(PREFIX + b"l"), None, "the key after the revocation")
    short = await client.lease(2, lease_id=77001)
    expect(short.id, 77001, "a chosen lease id")
    try:
        await client.lease(2, lease_id=77001)
    except aetcd.DuplicateLeaseError:
        pass
    else:
        raise SystemExit("one lease id was given twice")
    await client.put(PREFIX + b"s", b"x", lease=short)
    async with asyncio.timeout(30):
        while await client.get(PREFIX + b"s") is not None:
            await asyncio.sleep(0.2)


async def locks(client, other):
    """The package's lock is a lease, a transaction and a watch."""
    held, wanted = client.lock(PREFIX + b"lock", ttl=30), other.lock(PREFIX + b"lock", ttl=30)
    expect(await held.acquire(), True, "a free lock")
    expect(await wanted.acquire(timeout=1), False, "a lock that is held")
    waiting = asyncio.create_task(wanted.acquire(timeout=20))
    await asyncio.sleep(0.3)
    expect(await held.release(), True, "the release")
    expect(await waiting, True, "the lock after its release")
    expect((await held.is_acquired(), await wanted.is_acquired()), (False, True), "the owner")
    await wanted.release()


async def cluster(client):
    members = [member async for member in client.members()]
    status = await client.status()
    expect(status.leader.id, members[0].id, "the leader")
    if not status.version or status.db_size <= 0:
        raise SystemExit(f"status: version {status.version!r}, size {status.db_size}")
    expect([alarm async for alarm in client.list_alarms()], [], "alarms")
    file = io.BytesIO()
    await client.snapshot(file)
    # A page, and the hash behind the last page.
    expect((file.tell() > 4096, file.tell() % 512), (True, 32), "size of a snapshot")


async def users(client):
    """Leaves the store without users again; the package itself has no calls to make them."""
    stub, messages = aetcd.rpc.AuthStub(client.channel), aetcd.rpc

    async def call(name, request, /, **fields):
        await getattr(stub, name)(getattr(messages, request)(**fields), **options)

    options = {}
    for step in (
        ("RoleAdd", "AuthRoleAddRequest", {"name": "aetcd-role"}),
        ("UserAdd", "AuthUserAddRequest", {"name": "aetcd-user", "password": "pw"}),
        ("UserGrantRole", "AuthUserGrantRoleRequest", {"user": "aetcd-user", "role": "aetcd-role"}),
        ("UserAdd", "AuthUserAddRequest", {"name": "root", "password": "secret"}),
        ("UserGrantRole", "AuthUserGrantRoleRequest", {"user": "root", "role": "root"}),
        ("AuthEnable", "AuthEnableRequest", {}),
    ):
        await call(step[0], step[1], **step[2])
    async with connect(username="root", password="secret") as root:
        await root.put(PREFIX + b"user", b"1")
        async with connect(username="aetcd-user", password="pw") as user:
            try:
                await user.get(PREFIX + b"user")
            except aetcd.ClientError as error:
                expect(str(error), "etcdserver: permission denied", "a read without permission")
            else:
                raise SystemExit("a read without permission was answered")
        options["metadata"] = root.metadata
        await call("AuthDisable", "AuthDisableRequest")
    options.clear()
    await call("UserDelete", "AuthUserDeleteRequest", name="aetcd-user")
    await call("UserDelete", "AuthUserDeleteRequest", name="root")
    await call("RoleDelete", "AuthRoleDeleteRequest", role="aetcd-role")


asyncio.run(main())
