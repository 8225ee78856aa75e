//! The socket for other shells: one command per connection, a line in and a text out. Only the
//! folder's owner reaches it. What a command does is not decided here.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream as BlockingStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, oneshot};

use super::command::Command;

/// Name of the socket in the folder.
pub(crate) const SOCKET: &str = "control.sock";
/// Longest command line. Unit: bytes.
const LINE_BYTES_MAX: u64 = 1024;
/// Longest wait for the line of a connection.
const LINE_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest wait for answers on their way when the lab ends.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);
/// Shells that wait at one time; further ones queue in the kernel.
const SHELLS_MAX: usize = 32;

/// A text for the user: what was done, or why it was not.
pub(crate) type Answer = Result<String, String>;

/// One command from another shell.
#[derive(Debug)]
pub(crate) struct Request {
    /// The command.
    pub(crate) command: Command,
    /// Takes the answer; dropped without one when the lab ends.
    pub(crate) reply: oneshot::Sender<Answer>,
}

/// A path to the folder's socket that is short however deep the folder lies: the names of sockets
/// are limited to 107 bytes. It is good while `dir` is open.
fn short_path(dir: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{SOCKET}", dir.as_raw_fd()))
}

/// The open socket.
pub(crate) struct Control(Arc<Semaphore>);

impl Control {
    /// Waits a moment for answers that are still on their way to shells.
    pub(crate) async fn drain(&self) {
        let shells = u32::try_from(SHELLS_MAX).expect("a small constant");
        // A shell that never reads its answer is left behind.
        let _left = tokio::time::timeout(DRAIN_TIMEOUT, self.0.acquire_many(shells)).await;
    }
}

/// Opens the socket and hands what comes in to `requests`. The caller holds the folder's lock, so
/// a socket that is there belongs to a lab that has ended.
///
/// # Errors
/// A text for the user.
pub(crate) fn listen(folder: &Path, requests: mpsc::Sender<Request>) -> Result<Control, String> {
    let open = || {
        match fs::remove_file(folder.join(SOCKET)) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let dir = File::open(folder)?;
        UnixListener::bind(short_path(&dir))
    };
    let listener = open()
        .map_err(|error| format!("cannot open the socket {SOCKET} in the folder: {error}"))?;
    let shells = Arc::new(Semaphore::new(SHELLS_MAX));
    tokio::spawn(accept(listener, requests, Arc::clone(&shells)));
    Ok(Control(shells))
}

async fn accept(listener: UnixListener, requests: mpsc::Sender<Request>, permits: Arc<Semaphore>) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            // File descriptors have run out.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        let requests = requests.clone();
        tokio::spawn(async move {
            // A shell that has gone away is no failure of the lab.
            let _gone = serve(stream, requests).await;
            drop(permit);
        });
    }
}

async fn serve(mut stream: UnixStream, requests: mpsc::Sender<Request>) -> std::io::Result<()> {
    let mut line = String::new();
    let (read, mut write) = stream.split();
    let mut bounded = read.take(LINE_BYTES_MAX);
    tokio::time::timeout(LINE_TIMEOUT, bounded.read_to_string(&mut line)).await??;
    let answer = match Command::parse(&line) {
        Ok(command) => {
            let (reply, answer) = oneshot::channel();
            let sent = requests.send(Request { command, reply }).await;
            let answer = if sent.is_ok() { answer.await.ok() } else { None };
            answer.unwrap_or_else(|| Err("the lab is ending".to_owned()))
        }
        Err(text) => Err(text),
    };
    let (word, text) = match &answer {
        Ok(text) => ("ok", text),
        Err(text) => ("error", text),
    };
    write.write_all(format!("{word}\n{text}").as_bytes()).await?;
    write.shutdown().await
}

/// Sends a command to the lab that runs in `dir` and prints the answer.
///
/// # Errors
/// A text for the user: no lab runs there, or what the lab answers.
pub(crate) fn tell(dir: &str, line: &str) -> Result<(), String> {
    let connected = File::open(dir).and_then(|dir| BlockingStream::connect(short_path(&dir)));
    let mut stream = connected.map_err(|error| match error.kind() {
        ErrorKind::NotFound | ErrorKind::ConnectionRefused | ErrorKind::NotADirectory => {
            format!("no lab runs in {dir}; 'kelson lab --dir {dir}' starts it")
        }
        _ => format!("cannot reach the lab in {dir}: {error}"),
    })?;
    let mut answer = String::new();
    stream
        .write_all(line.as_bytes())
        .and_then(|()| stream.shutdown(Shutdown::Write))
        .and_then(|()| stream.read_to_string(&mut answer))
        .map_err(|error| format!("cannot talk to the lab in {dir}: {error}"))?;
    match answer.split_once('\n') {
        Some(("ok", text)) => {
            super::say(text);
            Ok(())
        }
        Some((_, text)) => Err(text.to_owned()),
        None => Err(format!("the lab in {dir} ended without an answer")),
    }
}
