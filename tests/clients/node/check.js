// Drives the store with the `etcd3` package: put, get, delete, transaction, watch, lease, lock,
// election, software transactional memory and, where AUTH is set, users.
// It never prints anything on success; the first surprise ends it with a message and status 1.
// It runs from a copy beside the installed package, under target/.

import assert from "node:assert/strict";
import { Etcd3 } from "etcd3";

const prefix = "client-node/";
const giveUp = setTimeout(() => fail(new Error("not done after 60 s")), 60_000);

function fail(error) {
  console.error(error.stack ?? error);
  process.exit(1);
}

async function keys(client) {
  const first = await client.put(prefix + "a").value("1");
  const second = await client.put(prefix + "a").value("2").getPrevious();
  assert.equal(second.value.toString(), "1", "previous value");
  await client.put(prefix + "b").value("x");
  const raw = await client.get(prefix + "a").exec();
  assert.equal(raw.kvs[0].version, "2", "version");
  assert.equal(raw.kvs[0].create_revision, first.header.revision, "create revision");
  const names = await client.getAll().prefix(prefix).sort("Key", "Descend").keys();
  assert.deepEqual(names, [prefix + "b", prefix + "a"], "descending list");
  assert.equal(await client.get(prefix + "none").string(), null, "a missing key");
  const old = await client.get(prefix + "a").revision(first.header.revision).string();
  assert.equal(old, "1", "the value at an old revision");
  const gone = await client.delete().all().prefix(prefix);
  assert.equal(gone.deleted, "2", "keys deleted");
}

async function transactions(client) {
  const create = () =>
    client
      .if(prefix + "t", "Create", "==", 0)
      .then(client.put(prefix + "t").value("first"))
      .else(client.get(prefix + "t"))
      .commit();
  assert.equal((await create()).succeeded, true, "the first create");
  const second = await create();
  assert.equal(second.succeeded, false, "the second create");
  const found = second.responses[0].response_range.kvs[0].value.toString();
  assert.equal(found, "first", "the value found by the transaction");
}

async function watches(client) {
  const from = BigInt((await client.put(prefix + "w").value("0")).header.revision);
  const watcher = await client
    .watch()
    .prefix(prefix + "w")
    .startRevision(from.toString())
    .withPreviousKV()
    .create();
  const seen = [];
  const done = new Promise((resolve, reject) => {
    watcher.on("error", reject);
    const note = (kind) => (kv, before) => {
      const at = Number(BigInt(kv.mod_revision) - from);
      seen.push([kind, at, before?.value.toString() ?? null]);
      if (seen.length === 3) resolve();
    };
    watcher.on("put", note("put"));
    watcher.on("delete", note("delete"));
  });
  await client.put(prefix + "w").value("1");
  await client.delete().key(prefix + "w");
  await done;
  const want = [["put", 0, null], ["put", 1, "0"], ["delete", 2, "1"]];
  assert.deepEqual(seen, want, "events of the watch");
  await watcher.cancel();
}

async function leases(client) {
  const lease = client.lease(60);
  await lease.put(prefix + "l").value("x");
  await lease.keepaliveOnce();
  assert.equal(await client.get(prefix + "l").string(), "x", "the key under the lease");
  await lease.revoke();
  assert.equal(await client.get(prefix + "l").string(), null, "the key after the revocation");
  const short = client.lease(2, { autoKeepAlive: false });
  await short.put(prefix + "s").value("x");
  while ((await client.get(prefix + "s").string()) !== null) {
    await new Promise((resolve) => setTimeout(resolve, 200));
  }
  // The package's lock is a lease and a transaction, it needs no lock service.
  await client.lock(prefix + "lock").do(async () => {
    await assert.rejects(client.lock(prefix + "lock").acquire(), /Failed to acquire a lock/);
  });
}

// The package's election is keys under leases, like etcd's own.
async function elections(client, other) {
  const [first, second] = [client, other].map((c) => c.election(prefix + "election", 20));
  const campaign = first.campaign("one");
  await new Promise((resolve, reject) => campaign.on("elected", resolve).on("error", reject));
  assert.equal(await second.leader(), "one", "the leader");
  const observer = await second.observe();
  const seen = [observer.leader()];
  const changed = () => new Promise((resolve) => observer.once("change", resolve));
  const proclaimed = changed();
  await campaign.proclaim("one again");
  seen.push(await proclaimed);
  const next = second.campaign("two");
  let elected = false;
  const won = new Promise((resolve, reject) => next.on("elected", resolve).on("error", reject));
  won.then(() => (elected = true), () => {});
  await new Promise((resolve) => setTimeout(resolve, 300));
  assert.equal(elected, false, "two leaders at once");
  await campaign.resign();
  await won;
  assert.equal(await first.leader(), "two", "the next leader");
  await observer.cancel();
  await next.resign();
  assert.deepEqual(seen, ["one", "one again"], "what the observer saw");
}

// Both add to one number; a transaction that another overtook begins again.
async function memory(client, other) {
  const key = prefix + "stm";
  await client.put(key).value(0);
  let attempts = 0;
  const add = (c) =>
    c.stm({ retries: 50 }).transact(async (tx) => {
      attempts += 1;
      await tx.put(key).value((await tx.get(key).number()) + 1);
    });
  await Promise.all(Array.from({ length: 10 }, (_, i) => add(i % 2 ? client : other)));
  assert.equal(await client.get(key).number(), 10, "additions");
  assert.ok(attempts >= 10, `${attempts} attempts`);
}

// A lease that the package keeps alive outlives its term; one that is taken away says so.
async function keptLeases(client, other) {
  const lease = client.lease(2);
  const lost = new Promise((resolve) => lease.on("lost", resolve));
  await lease.put(prefix + "kept").value("x");
  await new Promise((resolve) => setTimeout(resolve, 4000));
  assert.equal(await other.get(prefix + "kept").string(), "x", "the key after two terms");
  await other.leaseClient.leaseRevoke({ ID: await lease.grant() });
  await lost;
  assert.equal(await other.get(prefix + "kept").string(), null, "the key after the revocation");
}

// Leaves the store without users again.
async function users(client) {
  const role = client.role("node-role");
  await role.create();
  await role.grant({ permission: "Readwrite", range: client.range({ prefix: prefix + "own/" }) });
  const user = client.user("node-user");
  await user.create("pw");
  await user.addRole("node-role");
  const root = client.user("root");
  await root.create("secret");
  await root.addRole("root");
  await client.auth.authEnable();
  const as = (username, password) =>
    new Etcd3({ hosts: process.env.ENDPOINT, auth: { username, password } });
  const [admin, plain, wrong] = [as("root", "secret"), as("node-user", "pw"), as("node-user", "x")];
  await plain.put(prefix + "own/a").value("1");
  assert.equal(await plain.get(prefix + "own/a").string(), "1", "a permitted read");
  await assert.rejects(plain.put(prefix + "a").value("1").exec(), /permission denied/, "outside");
  await assert.rejects(wrong.get(prefix + "own/a").exec(), /authentication failed/, "wrong password");
  await assert.rejects(client.get(prefix + "own/a").exec(), /user name is empty/, "no name");
  await admin.auth.authDisable();
  await user.delete();
  await root.delete();
  await role.delete();
  [admin, plain, wrong].forEach((c) => c.close());
}

async function errors(client) {
  await assert.rejects(client.put("").value("x").exec(), /key is not provided/, "an empty key");
}

async function main() {
  const client = new Etcd3({ hosts: process.env.ENDPOINT });
  await client.delete().all().prefix(prefix);
  await keys(client);
  await transactions(client);
  await watches(client);
  await leases(client);
  await errors(client);
  const other = new Etcd3({ hosts: process.env.ENDPOINT });
  await keptLeases(client, other);
  await elections(client, other);
  await memory(client, other);
  if (process.env.AUTH) await users(client);
  other.close();
  client.close();
}

main().then(() => clearTimeout(giveUp), fail);
