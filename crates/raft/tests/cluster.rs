//! Several members in one process, on loopback: they agree, forward, survive the loss of one, and
//! change who belongs to them. Through the public door only.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use kelson_api::Error;
use kelson_api::command::{MemberPublish, command::Op};
use kelson_api::etcdserverpb::{PutRequest, RangeRequest};
use kelson_raft::{
    MemberChange, Node, NodeConfig, PeerConnector, PeerIo, StartError, plain_connector,
};
use kelson_storage::Reader;
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio_stream::wrappers::TcpListenerStream;

/// A member and its peer listener.
struct Member {
    node: Node,
    reader: Reader,
    stop: Option<oneshot::Sender<()>>,
    serving: tokio::task::JoinHandle<()>,
    config: NodeConfig,
    address: SocketAddr,
}

impl Member {
    async fn start(config: NodeConfig, listener: TcpListener) -> Member {
        Self::try_start(config, listener).await.expect("the member starts")
    }

    async fn try_start(config: NodeConfig, listener: TcpListener) -> Result<Member, StartError> {
        let (node, reader) = Node::start(config.clone()).await?;
        let address = listener.local_addr().expect("a bound socket has an address");
        let (stop, stopped) = oneshot::channel::<()>();
        let server = tonic::transport::Server::builder().add_routes(node.peer_routes());
        let incoming = TcpListenerStream::new(listener);
        let serving = tokio::spawn(async move {
            let ended = async { drop(stopped.await) };
            server.serve_with_incoming_shutdown(incoming, ended).await.expect("serve peers");
        });
        Ok(Member { node, reader, stop: Some(stop), serving, config, address })
    }

    /// Takes the member away, its listener first.
    async fn stop(mut self) -> (NodeConfig, SocketAddr) {
        self.serving.abort();
        drop(self.stop.take());
        drop(self.serving.await);
        self.node.shutdown().await;
        (self.config, self.address)
    }

    async fn put(&self, key: &str) -> Result<i64, Error> {
        let put = PutRequest {
            key: key.to_owned().into(),
            value: "value".into(),
            ..PutRequest::default()
        };
        Ok(self.node.propose(Op::Put(put)).await?.revision)
    }

    /// A linearizable look.
    async fn has(&self, key: &str) -> bool {
        self.node.read_barrier().await.expect("a quorum answers");
        let request = RangeRequest {
            key: key.to_owned().into(),
            count_only: true,
            ..RangeRequest::default()
        };
        self.reader.range(&request).expect("reads the newest revision").0.count == 1
    }

    fn id(&self) -> u64 {
        self.node.status().member_id
    }

    async fn publish(&self) {
        let publish = MemberPublish {
            id: self.id(),
            name: self.config.name.clone(),
            storage_uuid: bytes::Bytes::copy_from_slice(&self.node.storage_uuid()),
            ..MemberPublish::default()
        };
        self.node.propose(Op::MemberPublish(publish)).await.expect("published");
    }
}

struct Lab {
    dir: TempDir,
}

impl Lab {
    fn new() -> Lab {
        Lab { dir: tempfile::tempdir().expect("make a directory") }
    }

    fn config(&self, name: &str, cluster: &[(String, Vec<String>)]) -> NodeConfig {
        let own = cluster.iter().find(|(listed, _)| listed == name).expect("it is listed");
        NodeConfig {
            name: name.to_owned(),
            initial_cluster: cluster.to_vec(),
            advertise_peer_urls: own.1.clone(),
            heartbeat: Duration::from_millis(50),
            election: Duration::from_millis(500),
            ..NodeConfig::with_defaults(self.place(name))
        }
    }

    fn place(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    async fn start(&self, names: &[&str]) -> Vec<Member> {
        self.start_behind(names, None).await
    }

    /// As [`Lab::start`], with this wall between the members.
    async fn start_behind(&self, names: &[&str], wall: Option<&Arc<Wall>>) -> Vec<Member> {
        let (mut listeners, mut cluster) = (Vec::new(), Vec::new());
        for name in names {
            let (listener, url) = bind().await;
            listeners.push(listener);
            cluster.push(((*name).to_owned(), vec![url]));
        }
        let mut members = Vec::new();
        if let Some(wall) = wall {
            let mut urls = wall.urls.lock().expect("no test panicked here");
            urls.extend(cluster.iter().flat_map(|(_, urls)| urls.clone()));
        }
        for (from, (name, listener)) in names.iter().zip(listeners).enumerate() {
            let mut config = self.config(name, &cluster);
            if let Some(wall) = wall {
                config.connect = wall.connector(from);
            }
            members.push(Member::start(config, listener).await);
        }
        for member in &members {
            ready(member).await;
            member.publish().await;
        }
        members
    }
}

/// Stands between members of different sides: what is sent through it is lost, without a word.
#[derive(Default)]
struct Wall {
    /// By member.
    urls: Mutex<Vec<String>>,
    /// One bit for each member: on the far side. Set once, for good.
    far: AtomicU64,
}

impl Wall {
    fn connector(self: &Arc<Self>, from: usize) -> PeerConnector {
        let (wall, connect) = (self.clone(), plain_connector());
        Arc::new(move |url: String| {
            let urls = wall.urls.lock().expect("no test panicked here");
            let to = urls.iter().position(|listed| *listed == url).expect("a known member");
            let (wall, connecting) = (wall.clone(), connect(url));
            Box::pin(async move {
                let io = connecting.await?;
                Ok(Box::new(Gate { io, wall, ends: [from, to] }) as Box<dyn PeerIo>)
            })
        })
    }

    fn raise(&self, far: &[usize]) {
        self.far.store(far.iter().fold(0, |bits, member| bits | 1 << member), Ordering::SeqCst);
    }
}

struct Gate {
    io: Box<dyn PeerIo>,
    wall: Arc<Wall>,
    ends: [usize; 2],
}

impl Gate {
    fn is_shut(&self) -> bool {
        let far = self.wall.far.load(Ordering::SeqCst);
        let [from, to] = self.ends.map(|member| far >> member & 1);
        from != to
    }
}

impl AsyncRead for Gate {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // Nobody need be woken: the wall stays.
        if self.is_shut() {
            Poll::Pending
        } else {
            Pin::new(&mut self.io).poll_read(context, buffer)
        }
    }
}

impl AsyncWrite for Gate {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.is_shut() {
            return Poll::Ready(Ok(bytes.len()));
        }
        Pin::new(&mut self.io).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}

async fn bind() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let url = format!("http://{}", listener.local_addr().expect("bound"));
    (listener, url)
}

async fn ready(member: &Member) {
    let ready = tokio::time::timeout(Duration::from_secs(30), member.node.ready());
    ready.await.expect("a leader within 30 s").expect("ready");
}

async fn leader(members: &[Member]) -> usize {
    eventually(|| members.iter().position(|member| member.node.status().is_leader)).await
}

async fn eventually<T>(look: impl Fn() -> Option<T>) -> T {
    let looking = async {
        loop {
            if let Some(found) = look() {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), looking).await.expect("within 30 s")
}

/// Puts until it succeeds: a caller does not know the outcome of the tries before.
async fn put_at_last(member: &Member, key: &str) {
    let trying = async { while member.put(key).await.is_err() {} };
    tokio::time::timeout(Duration::from_secs(30), trying).await.expect("within 30 s");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_member_writes_and_reads() {
    let lab = Lab::new();
    let members = lab.start(&["a", "b", "c"]).await;
    for (number, member) in members.iter().enumerate() {
        for round in 0..20 {
            member.put(&format!("{number}/{round}")).await.expect("a quorum is there");
            let reader = &members[(number + round) % 3];
            assert!(reader.has(&format!("{number}/{round}")).await, "{number}/{round}");
        }
    }
    // Who neither wrote nor read the last one may still have it before it.
    let is_whole = |member: &Member| member.reader.revision() == 61;
    eventually(|| members.iter().all(is_whole).then_some(())).await;
    let ids: Vec<u64> = members[0].reader.members().iter().map(|member| member.id).collect();
    assert_eq!(ids.len(), 3);
    for member in members {
        member.stop().await;
    }
}

/// A leader behind the wall with a minority does not know for a while that it was deposed; neither it
/// nor who asks it may answer from what it knows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_minority_with_the_old_leader_reads_nothing_stale() {
    let (lab, wall) = (Lab::new(), Arc::new(Wall::default()));
    let members = lab.start_behind(&["a", "b", "c", "d", "e"], Some(&wall)).await;
    let old = leader(&members).await;
    put_at_last(&members[old], "before").await;
    for member in &members {
        assert!(member.has("before").await);
    }
    let beside = (old + 1) % 5;
    let majority: Vec<&Member> = (2..5).map(|distance| &members[(old + distance) % 5]).collect();
    wall.raise(&[old, beside]);
    // Readers that begin before, during and after the election.
    let deposed = [&members[old], &members[beside]];
    let read = |member: &Member| {
        let node = member.node.clone();
        async move { tokio::time::timeout(Duration::from_millis(100), node.read_barrier()).await }
    };
    let is_elected = || majority.iter().any(|member| member.node.status().is_leader);
    while !is_elected() {
        for member in deposed {
            let _too_late_or_not = read(member).await;
        }
    }
    put_at_last(majority[0], "after").await;
    for _ in 0..20 {
        for member in deposed {
            let barrier = read(member).await;
            assert!(!matches!(barrier, Ok(Ok(_))), "a stale read: {barrier:?}");
        }
    }
    for member in &majority {
        assert!(member.has("after").await);
    }
    for member in members {
        member.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_loss_of_the_leader_loses_nothing() {
    let lab = Lab::new();
    let mut members = lab.start(&["a", "b", "c"]).await;
    for round in 0..3 {
        members[round % members.len()].put(&format!("before/{round}")).await.expect("put");
        let gone = members.remove(leader(&members).await);
        let (config, address) = gone.stop().await;
        put_at_last(&members[0], &format!("during/{round}")).await;
        assert!(members[1].has(&format!("before/{round}")).await);
        let listener = TcpListener::bind(address).await.expect("the port is free again");
        let back = Member::start(config, listener).await;
        ready(&back).await;
        assert!(back.has(&format!("during/{round}")).await);
        members.push(back);
    }
    for member in members {
        member.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leadership_moves_on_request() {
    let lab = Lab::new();
    let members = lab.start(&["a", "b", "c"]).await;
    let old = leader(&members).await;
    let target = (old + 1) % 3;
    assert_eq!(members[target].node.move_leader(1).await, Err(Error::NotLeader));
    assert_eq!(members[old].node.move_leader(1).await, Err(Error::BadLeaderTransferee));
    members[old].node.move_leader(members[target].id()).await.expect("it moves");
    eventually(|| members[target].node.status().is_leader.then_some(())).await;
    members[old].put("after").await.expect("forwarded to the new leader");
    for member in members {
        member.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn learners_that_are_added_at_once_are_counted() {
    let lab = Lab::new();
    let members = lab.start(&["a", "b", "c"]).await;
    let mut adding = tokio::task::JoinSet::new();
    for place in 0..9 {
        let node = members[place % 3].node.clone();
        let peer_urls = vec![format!("http://127.0.0.1:{}", 1 + place)];
        let add = MemberChange::Add { peer_urls, is_learner: true };
        adding.spawn(async move { node.change_members(add).await });
    }
    let answers = adding.join_all().await;
    assert_eq!(answers.iter().filter(|answer| answer.is_ok()).count(), 1, "{answers:?}");
    let mut refusals = answers.iter().filter_map(|answer| answer.as_ref().err());
    assert!(refusals.all(|error| *error == Error::TooManyLearners), "{answers:?}");
    for member in members {
        member.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_come_and_go() {
    let lab = Lab::new();
    let mut members = lab.start(&["a", "b", "c"]).await;
    members[0].put("old").await.expect("put");
    let (listener, url) = bind().await;
    let add = MemberChange::Add { peer_urls: vec![url.clone()], is_learner: true };
    let id = members[1].node.change_members(add).await.expect("added");
    let again = MemberChange::Add { peer_urls: vec![url.clone()], is_learner: false };
    assert_eq!(members[2].node.change_members(again).await, Err(Error::PeerUrlExists));
    assert_eq!(
        members[0].node.change_members(MemberChange::Promote(7)).await,
        Err(Error::MemberNotFound)
    );

    let mut cluster: Vec<(String, Vec<String>)> = members[0].config.initial_cluster.clone();
    cluster.push(("d".to_owned(), vec![url]));
    let joining = NodeConfig { initial_state_existing: true, ..lab.config("d", &cluster) };
    let joined = Member::start(joining, listener).await;
    assert_eq!(joined.id(), id);
    ready(&joined).await;
    joined.publish().await;
    assert!(joined.has("old").await);
    assert!(joined.node.status().is_learner);
    let promoting = async {
        while let Err(error) = members[0].node.change_members(MemberChange::Promote(id)).await {
            assert_eq!(error, Error::LearnerNotReady);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), promoting).await.expect("within 30 s");
    let is_voter = || !joined.reader.members().iter().any(|member| member.is_learner);
    eventually(|| is_voter().then_some(())).await;
    let named = joined.reader.members().into_iter().find(|member| member.id == id);
    assert_eq!(named.expect("it is listed").name, "d", "a change keeps what was published");
    members.push(joined);

    // The leader itself goes.
    let gone = members.remove(leader(&members).await);
    let gone_id = gone.id();
    let told = gone.node.removed();
    members[0].node.change_members(MemberChange::Remove(gone_id)).await.expect("removed");
    let mut waiting = told.clone();
    let noticing = waiting.wait_for(|removed| *removed);
    tokio::time::timeout(Duration::from_secs(30), noticing).await.expect("told").expect("open");
    let (config, address) = gone.stop().await;
    put_at_last(&members[0], "after").await;
    for member in &members {
        assert!(member.has("after").await);
        assert_eq!(member.reader.members().len(), 3);
    }
    // It can never come back.
    let listener = TcpListener::bind(address).await.expect("the port is free again");
    let back = Member::start(config, listener).await;
    let mut told = back.node.removed();
    let noticing = told.wait_for(|removed| *removed);
    tokio::time::timeout(Duration::from_secs(30), noticing).await.expect("told").expect("open");
    back.stop().await;
    for member in members {
        member.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_voter_gets_its_vote_by_itself() {
    let lab = Lab::new();
    let members = lab.start(&["a"]).await;
    for number in 0..50 {
        members[0].put(&format!("key{number}")).await.expect("put");
    }
    let (listener, url) = bind().await;
    let add = MemberChange::Add { peer_urls: vec![url.clone()], is_learner: false };
    let id = members[0].node.change_members(add).await.expect("added");
    // It has not started, and nothing waits for it.
    members[0].put("meanwhile").await.expect("one member still is a quorum");
    let mut cluster = members[0].config.initial_cluster.clone();
    cluster.push(("b".to_owned(), vec![url]));
    let joining = NodeConfig { initial_state_existing: true, ..lab.config("b", &cluster) };
    let joined = Member::start(joining, listener).await;
    // Clients asked for a voter: it must refuse none of them as a learner, not even before its vote.
    let told = joined.node.clone();
    let promoted = || {
        assert!(!told.status().is_learner, "it says to be a learner");
        members[0].node.voters().contains(&id).then_some(())
    };
    eventually(promoted).await;
    ready(&joined).await;
    assert!(joined.has("meanwhile").await);
    joined.put("both").await.expect("both agree");
    joined.stop().await;
    let alone = tokio::time::timeout(Duration::from_secs(1), members[0].put("alone")).await;
    assert!(alone.is_err(), "one of two voters is no quorum");
    for member in members {
        member.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lone_survivor_goes_on_if_told_to() {
    let lab = Lab::new();
    let mut members = lab.start(&["a", "b", "c"]).await;
    members[0].put("key").await.expect("put");
    assert!(members[1].has("key").await);
    let (config, address) = members.remove(1).stop().await;
    for member in members {
        member.stop().await;
    }
    let forced = NodeConfig { force_new_cluster: true, ..config.clone() };
    for config in [forced.clone(), forced, config] {
        let listener = TcpListener::bind(address).await.expect("the port is free again");
        let alone = Member::start(config, listener).await;
        ready(&alone).await;
        assert!(alone.has("key").await);
        alone.put("after").await.expect("one member is a quorum");
        assert_eq!(alone.reader.members().len(), 1);
        assert_eq!(alone.reader.removed_members().len(), 2);
        alone.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_emptied_member_is_refused() {
    let lab = Lab::new();
    let mut members = lab.start(&["a", "b", "c"]).await;
    members[0].put("key").await.expect("put");
    let (config, address) = members.remove(2).stop().await;
    std::fs::remove_dir_all(lab.place("c")).expect("empty it");
    let again = Node::start(config.clone()).await.map(|_| ()).expect_err("refused");
    assert!(again.to_string().contains("has already been bootstrapped"), "{again}");
    let existing = NodeConfig { initial_state_existing: true, ..config.clone() };
    std::fs::remove_dir_all(lab.place("c")).expect("empty it");
    let again = Node::start(existing).await.map(|_| ()).expect_err("refused");
    assert!(again.to_string().contains("has already been bootstrapped"), "{again}");

    // If nobody could be asked at the start, it still takes no part.
    let others: Vec<_> = std::mem::take(&mut members);
    let mut stopped = Vec::new();
    for member in others {
        stopped.push(member.stop().await);
    }
    std::fs::remove_dir_all(lab.place("c")).expect("empty it");
    let listener = TcpListener::bind(address).await.expect("the port is free again");
    let blank = Member::start(config, listener).await;
    let (config, address) = stopped.remove(0);
    let listener = TcpListener::bind(address).await.expect("the port is free again");
    let whole = Member::start(config, listener).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(whole.node.status().leader, None, "one whole and one blank member are no quorum");
    assert_eq!(blank.node.status().leader, None);
    let (config, address) = stopped.remove(0);
    let listener = TcpListener::bind(address).await.expect("the port is free again");
    let second = Member::start(config, listener).await;
    ready(&whole).await;
    assert!(second.has("key").await);
    let by_id: BTreeMap<u64, String> =
        whole.reader.members().into_iter().map(|member| (member.id, member.name)).collect();
    assert_eq!(by_id.len(), 3);
    for member in [blank, whole, second] {
        member.stop().await;
    }
}
