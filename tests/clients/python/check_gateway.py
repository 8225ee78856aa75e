"""Drives the store with the `etcd3gw` package, which speaks JSON over HTTP: status, members, put, get,
delete, create, replace, transaction, lease, lock, watch, the errors, and all of it as a user.

It never prints anything on success; the first surprise ends it with a message and status 1.
"""

import base64
import os
import queue
import threading
import time
from urllib.parse import urlparse

import etcd3gw
import requests
from etcd3gw import exceptions

PREFIX = "client-gateway/"
ADDRESS = urlparse(os.environ["ENDPOINT"])


def expect(got, want, what):
    if got != want:
        raise SystemExit(f"{what}: got {got!r}, want {want!r}")


def main():
    client, other = connect(), connect()
    expect(client.api_path, "/v3/", "the path that the version names")
    client.delete_prefix(PREFIX)
    cluster(client)
    keys(client)
    transactions(client)
    leases(client)
    locks(client, other)
    watches(client, other)
    errors(client)
    if os.environ.get("AUTH"):
        users(client)


def connect():
    return etcd3gw.client(host=ADDRESS.hostname, port=ADDRESS.port, timeout=20)


def cluster(client):
    status, members = client.status(), client.members()
    expect(status["leader"], members[0]["ID"], "the leader")
    expect(members[0]["clientURLs"], [os.environ["ENDPOINT"]], "client URLs")
    for name in ("dbSize", "raftIndex", "raftTerm"):
        # Numbers of 64 bits are strings.
        if not isinstance(status[name], str) or int(status[name]) <= 0:
            raise SystemExit(f"status: {name} is {status[name]!r}")


def keys(client):
    expect(client.put(PREFIX + "a", "1"), True, "a put")
    client.put(PREFIX + "a", b"\xff\x002")
    client.put(PREFIX + "b", "x")
    expect(client.get(PREFIX + "a"), [b"\xff\x002"], "a value of any bytes")
    [(value, meta)] = client.get(PREFIX + "a", metadata=True)
    expect((value, meta["key"], meta["version"]), (b"\xff\x002", PREFIX.encode() + b"a", "2"), "a key")
    first = int(meta["create_revision"])
    expect(int(meta["mod_revision"]), first + 1, "revisions")
    expect(client.get(PREFIX + "a", revision=first), [b"1"], "an old value")
    names = [meta["key"] for _, meta in client.get_prefix(PREFIX, "descend", "key")]
    expect(names, [b"client-gateway/b", b"client-gateway/a"], "descending list")
    expect(client.get(PREFIX, range_end=PREFIX + "z", limit=1, sort_order="descend",
                      sort_target="mod"), [b"x"], "a limited list")
    expect(client.get(PREFIX + "none"), [], "a missing key")
    expect(client.get(PREFIX + "a", count_only=True), [], "a count")
    expect(client.delete(PREFIX + "none"), False, "the deletion of nothing")
    expect(client.delete_prefix(PREFIX), True, "the deletion of a prefix")
    expect(client.get_prefix(PREFIX), [], "the list after it")


def transactions(client):
    expect(client.create(PREFIX + "t", "first"), True, "the first create")
    expect(client.create(PREFIX + "t", "again"), False, "the second create")
    expect(client.replace(PREFIX + "t", "first", "second"), True, "a swap that fits")
    expect(client.replace(PREFIX + "t", "first", "third"), False, "a swap that does not fit")
    key = base64.b64encode((PREFIX + "t").encode()).decode()
    answer = client.transaction({
        "compare": [{"key": key, "target": "VERSION", "result": "GREATER", "version": "1"}],
        "success": [
            {"requestPut": {"key": key, "value": base64.b64encode(b"third").decode(), "prevKv": True}},
            {"request_range": {"key": key}},
        ],
        "failure": [],
    })
    expect(answer["succeeded"], True, "a transaction")
    put, got = answer["responses"]
    expect(base64.b64decode(put["response_put"]["prev_kv"]["value"]), b"second", "previous value")
    expect(base64.b64decode(got["response_range"]["kvs"][0]["value"]), b"third", "read of own write")


def leases(client):
    lease = client.lease(ttl=60)
    client.put(PREFIX + "l", "x", lease=lease)
    expect(lease.keys(), [b"client-gateway/l"], "keys of the lease")
    if not 55 <= lease.ttl() <= 60:
        raise SystemExit(f"time to live: {lease.ttl()}")
    expect(lease.refresh(), 60, "time to live after a keep-alive")
    expect(lease.revoke(), True, "the revocation")
    expect(client.get(PREFIX + "l"), [], "the key after the revocation")
    expect(lease.refresh(), -1, "a keep-alive after the revocation")
    short = client.lease(ttl=2)
    client.put(PREFIX + "s", "x", lease=short)
    deadline = time.monotonic() + 30
    while client.get(PREFIX + "s"):
        if time.monotonic() > deadline:
            raise SystemExit("a lease of 2 s still lives after 30 s")
        time.sleep(0.2)


def locks(client, other):
    """The package's lock is a lease and a transaction."""
    held, wanted = client.lock("client-gateway", ttl=20), other.lock("client-gateway", ttl=20)
    expect(held.acquire(), True, "a free lock")
    expect(wanted.acquire(), False, "a lock that is held")
    expect((held.is_acquired(), wanted.is_acquired()), (True, False), "the owner")
    expect(held.refresh(), 20, "time to live of the lock")
    expect(held.release(), True, "the release")
    expect(wanted.acquire(), True, "the lock after its release")
    expect(wanted.release(), True, "the second release")


def watches(client, other):
    client.put(PREFIX + "w/a", "0")
    [(_, meta)] = client.get(PREFIX + "w/a", metadata=True)
    start = int(meta["mod_revision"])
    events, cancel = other.watch_prefix(PREFIX + "w/", start_revision=start, prev_kv=True)
    heard = queue.Queue()

    def hear():
        for event in events:
            heard.put(event)

    threading.Thread(target=hear, daemon=True).start()
    seen = []

    def see():
        event = heard.get(timeout=20)
        before = event.get("prev_kv", {}).get("value")
        before = base64.b64decode(before).decode() if before else None
        seen.append((event.get("type", "PUT"), int(event["kv"]["mod_revision"]) - start, before))

    # The package takes one chunk for one message, so each change waits for its event.
    see()
    client.put(PREFIX + "w/a", "1")
    see()
    client.delete(PREFIX + "w/a")
    see()
    cancel()
    expect(seen, [("PUT", 0, None), ("PUT", 1, "0"), ("DELETE", 2, "1")], "events")
    key = PREFIX + "once"
    timer = threading.Timer(0.5, client.put, (key, "x"))
    timer.start()
    expect(other.watch_once(key, timeout=20)["kv"]["value"], b"x", "the one event")
    timer.join()


def errors(client):
    for what, request, want in (
        ("an empty key", lambda: client.put("", ""), "etcdserver: key is not provided"),
        ("a future revision", lambda: client.get(PREFIX, revision=1 << 40),
         "etcdserver: mvcc: required revision is a future revision"),
    ):
        try:
            request()
        except exceptions.Etcd3Exception as error:
            if want not in (error.detail_text or ""):
                raise SystemExit(f"{what}: {error.detail_text!r}")
        else:
            raise SystemExit(f"{what} was accepted")
    refused = requests.post(os.environ["ENDPOINT"] + "/v3/kv/put", data="{", timeout=20)
    expect(refused.status_code, 400, "broken JSON")
    expect(refused.json()["code"], 3, "code of broken JSON")


def users(client):
    """Leaves the store without users again; the package itself has no calls to make them."""
    def auth(path, token=None, **fields):
        headers = {"Authorization": token} if token else {}
        answer = requests.post(f"{os.environ['ENDPOINT']}/v3/auth/{path}", json=fields,
                               headers=headers, timeout=20)
        expect(answer.status_code, 200, f"{path}: {answer.text}")
        return answer.json()

    def as_user(name):
        token = auth("authenticate", name=name, password="secret")["token"]
        other = connect()
        other.session.headers["Authorization"] = token
        return other, token

    own = base64.b64encode((PREFIX + "u/").encode()).decode()
    end = base64.b64encode((PREFIX + "u0").encode()).decode()
    auth("role/add", name="gateway-role")
    auth("role/grant", name="gateway-role",
         perm={"permType": "READWRITE", "key": own, "range_end": end})
    for name, role in (("gateway-user", "gateway-role"), ("root", "root")):
        auth("user/add", name=name, password="secret")
        auth("user/grant", user=name, role=role)
    auth("enable")
    (root, token), (user, _) = as_user("root"), as_user("gateway-user")
    root.put(PREFIX + "other", "1")
    lease = user.lease(ttl=60)
    user.put(PREFIX + "u/a", "1", lease=lease)
    expect(user.get(PREFIX + "u/a"), [b"1"], "a key of the user's own")
    expect(lease.keys(), [b"client-gateway/u/a"], "the lease on it")
    expect(user.replace(PREFIX + "u/a", "1", "2"), True, "a swap of its value")
    timer = threading.Timer(0.5, user.put, (PREFIX + "u/b", "x"))
    timer.start()
    expect(user.watch_once(PREFIX + "u/b", timeout=20)["kv"]["value"], b"x", "a watch of one")
    timer.join()
    for what, request, want in (
        ("a read", lambda: user.get(PREFIX + "other"), "permission denied"),
        ("a list", lambda: user.get_prefix(PREFIX), "permission denied"),
        ("a swap", lambda: user.replace(PREFIX + "other", "1", "2"), "permission denied"),
        ("nobody's read", lambda: client.get(PREFIX + "u/a"), "user name is empty"),
    ):
        try:
            request()
        except exceptions.Etcd3Exception as error:
            if want not in (error.detail_text or ""):
                raise SystemExit(f"{what}: {error.detail_text!r}")
        else:
            raise SystemExit(f"{what} was answered")
    lease.revoke()
    auth("disable", token=token)
    for name in ("gateway-user", "root"):
        auth("user/delete", name=name)
    auth("role/delete", role="gateway-role")


main()
