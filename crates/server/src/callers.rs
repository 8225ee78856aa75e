//! Who is calling: the user to whom a call's token was given, or whom the client's certificate names.
//! A service asks only when it needs to know, at the place where etcd does; what the user may do is
//! for the rules of the store. It makes tokens too, but checks no password and knows no service.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kelson_api::Error;
use kelson_api::command::{Asker, Login, command::Op};
use kelson_api::etcdserverpb::TxnRequest;
use kelson_raft::Node;
use kelson_storage::{Outcome, Reader, Reply};
use tonic::Extensions;
use tonic::metadata::MetadataMap;

use crate::config::Config;
use crate::jwt::Jwt;

/// How often it is looked for tokens whose time is over. Source: etcd.
const EXPIRE_EVERY: Duration = Duration::from_secs(1);

/// Letters of a simple token before the point. Source: etcd.
const SIMPLE_LEN: usize = 16;

const LETTERS: &[u8; 52] = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";

/// The common name in the certificate of a connection, if the client showed one. The listener puts it
/// into every request of the connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientName(pub Arc<str>);

/// What kind of tokens there are, by `--auth-token`.
#[derive(Debug)]
pub enum Tokens {
    /// None at all: nobody gets one and none is right.
    Nothing,
    /// Random words that every member learns from the log.
    Simple,
    /// Words that say who was recognized, signed.
    Jwt(Jwt),
}

impl Tokens {
    /// Reads `--auth-token`, and the keys that it names.
    ///
    /// # Errors
    /// What is wrong with the setting or with a file.
    pub fn from_flag(setting: &str) -> Result<Self, String> {
        let mut parts = setting.split(',');
        let kind = parts.next().unwrap_or_default();
        let wrong = |reason: String| format!("--auth-token={setting}: {reason}");
        let mut options = Vec::new();
        for part in parts {
            let (name, value) = part
                .split_once('=')
                .filter(|(_, value)| !value.contains('='))
                .ok_or_else(|| wrong(format!("\"{part}\" is not name=value")))?;
            if options.iter().any(|(known, _)| *known == name) {
                return Err(wrong(format!("{name} is given twice")));
            }
            options.push((name, value));
        }
        match kind {
            "" => Ok(Self::Nothing),
            "simple" => Ok(Self::Simple),
            "jwt" => Jwt::new(&options).map(Self::Jwt).map_err(wrong),
            other => Err(wrong(format!("unknown kind \"{other}\": use simple or jwt"))),
        }
    }
}

/// Recognizes the clients of one member.
pub struct Callers {
    node: Node,
    reader: Reader,
    tokens: Tokens,
    /// Unit: milliseconds.
    ttl: u64,
    /// A verified certificate is as good as a token.
    takes_certificates: bool,
    started: Instant,
}

impl Callers {
    /// For a member with simple tokens that last five minutes and without certificates: the flags'
    /// defaults.
    #[must_use]
    pub fn new(node: Node, reader: Reader) -> Self {
        let (tokens, started) = (Tokens::Simple, Instant::now());
        Self { node, reader, tokens, ttl: 300_000, takes_certificates: false, started }
    }

    /// As the flags say.
    #[must_use]
    pub fn with_flags(mut self, tokens: Tokens, config: &Config) -> Self {
        self.tokens = tokens;
        // As in etcd, no time means the default.
        if config.auth_token_ttl > 0 {
            self.ttl = u64::from(config.auth_token_ttl) * 1000;
        }
        self.takes_certificates = config.client_tls.client_cert_auth;
        self
    }

    /// Forgets tokens whose time is over, until it is dropped.
    pub(crate) async fn run(self: Arc<Self>) {
        let mut every = tokio::time::interval(EXPIRE_EVERY);
        loop {
            every.tick().await;
            self.reader.expire_tokens(self.now(), self.ttl);
        }
    }

    /// Milliseconds on a clock of our own.
    fn now(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// What a call says of who makes it.
    pub(crate) fn caller(
        self: &Arc<Self>,
        metadata: &MetadataMap,
        extensions: &Extensions,
    ) -> Caller {
        let token = metadata.get("token").or_else(|| metadata.get("authorization"));
        let token = token.map(|token| {
            let token = String::from_utf8_lossy(token.as_bytes());
            token.strip_prefix("Bearer ").unwrap_or(&token).to_owned()
        });
        // The gateway's own certificate says nothing of who uses the gateway.
        let is_direct = self.takes_certificates && !metadata.contains_key("grpcgateway-accept");
        let name = extensions.get::<ClientName>().filter(|_| is_direct);
        Caller { callers: Arc::clone(self), token, name: name.cloned() }
    }

    async fn recognize(&self, token: &str) -> Result<Asker, Error> {
        let user = match &self.tokens {
            Tokens::Nothing => None,
            Tokens::Simple => self.recognize_simple(token).await,
            Tokens::Jwt(jwt) => return jwt.verify(token, now_unix()),
        };
        let user = user.ok_or(Error::InvalidAuthToken)?;
        Ok(Asker { user, auth_revision: self.reader.auth_revision() })
    }

    async fn recognize_simple(&self, token: &str) -> Option<String> {
        let (_, index) = token.split_once('.')?;
        let is_number = !index.is_empty() && index.bytes().all(|byte| byte.is_ascii_digit());
        let index: u64 = is_number.then(|| index.parse().ok())??;
        if let Some(user) = self.reader.use_token(token, self.now()) {
            return Some(user);
        }
        // It may have been given out by another member a moment ago. After a barrier this one has all
        // that was answered before, whatever the number says.
        if index <= self.reader.applied().index || self.node.read_barrier().await.is_err() {
            return None;
        }
        self.reader.use_token(token, self.now())
    }

    /// A new token for a user whose password was right at `revision`.
    ///
    /// # Errors
    /// `VerifyOnlyKey`, `AuthFailed`, `AuthNotEnabled`, and those of a proposal.
    pub(crate) async fn log_in(&self, user: &str, revision: u64) -> Result<String, Error> {
        match &self.tokens {
            Tokens::Nothing => Err(Error::AuthFailed),
            Tokens::Jwt(jwt) => jwt.sign(user, revision, now_unix()),
            Tokens::Simple => {
                let login = Login { user: user.to_owned(), token: random_word()? };
                let outcome = self.node.propose_for(Asker::default(), Op::Login(login)).await?;
                match outcome.result? {
                    Reply::Login(token) => Ok(token),
                    _ => Err(Error::AuthFailed),
                }
            }
        }
    }
}

/// Unit: seconds since 1970.
fn now_unix() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// Letters that nobody can guess.
fn random_word() -> Result<String, Error> {
    let mut word = String::with_capacity(SIMPLE_LEN);
    let mut bytes = [0; 2 * SIMPLE_LEN];
    while word.len() < SIMPLE_LEN {
        getrandom::fill(&mut bytes).map_err(|error| {
            tracing::error!(%error, "the system has no random numbers for a token");
            Error::AuthFailed
        })?;
        // Beyond the last multiple of 52 some letters would come more often than others.
        let fair = bytes.iter().filter(|byte| **byte < 208);
        let letters = fair.map(|byte| char::from(LETTERS[usize::from(*byte) % LETTERS.len()]));
        word.extend(letters.take(SIMPLE_LEN - word.len()));
    }
    Ok(word)
}

/// The maker of one call. A service must ask it before it answers.
#[must_use = "who calls must be asked for, or passed over by name"]
pub struct Caller {
    callers: Arc<Callers>,
    token: Option<String>,
    name: Option<ClientName>,
}

impl Caller {
    /// Who it is; `None` = the call does not say. A token is good for a while longer after this.
    ///
    /// # Errors
    /// `InvalidAuthToken`.
    async fn known(&self) -> Result<Option<Asker>, Error> {
        let reader = &self.callers.reader;
        if let Some(token) = self.token.as_ref().filter(|_| reader.is_auth_enabled()) {
            return self.callers.recognize(token).await.map(Some);
        }
        let asker = |name: &ClientName| Asker {
            user: name.0.to_string(),
            auth_revision: reader.auth_revision(),
        };
        Ok(self.name.as_ref().map(asker))
    }

    /// Who it is, for a command or a rule of the store; the empty one = the call does not say.
    ///
    /// # Errors
    /// `InvalidAuthToken`.
    pub(crate) async fn asker(&self) -> Result<Asker, Error> {
        Ok(self.known().await?.unwrap_or_default())
    }

    /// Whether it is anybody who is known.
    ///
    /// # Errors
    /// `InvalidAuthToken`, `UserEmpty`.
    pub(crate) async fn anybody(&self) -> Result<(), Error> {
        let is_enabled = self.callers.reader.is_auth_enabled();
        match self.known().await? {
            None if is_enabled => Err(Error::UserEmpty),
            _ => Ok(()),
        }
    }

    /// Whether it is somebody with the role root.
    ///
    /// # Errors
    /// `InvalidAuthToken`, `UserEmpty`, `UserNotFound`, `PermissionDenied`.
    pub(crate) async fn admin(&self) -> Result<(), Error> {
        self.callers.reader.check_admin(&self.asker().await?)
    }

    /// Whether it may read a range.
    ///
    /// # Errors
    /// `InvalidAuthToken`, and those of `Reader::check_range`.
    pub(crate) async fn reads(&self, key: &[u8], range_end: &[u8]) -> Result<Seen, Error> {
        let asker = self.asker().await?;
        self.callers.reader.check_range(&asker, key, range_end)?;
        Ok(self.seen(&asker))
    }

    /// Whether it may run a transaction here that only reads.
    ///
    /// # Errors
    /// As [`Caller::reads`].
    pub(crate) async fn reads_txn(&self, request: &TxnRequest) -> Result<Seen, Error> {
        let asker = self.asker().await?;
        self.callers.reader.check_txn(&asker, request)?;
        Ok(self.seen(&asker))
    }

    fn seen(&self, asker: &Asker) -> Seen {
        Seen { reader: self.callers.reader.clone(), auth_revision: asker.auth_revision }
    }

    /// Proposes a command on behalf of the caller.
    ///
    /// # Errors
    /// `InvalidAuthToken`, and those of `Node::propose_for`.
    pub(crate) async fn propose(&self, op: Op) -> Result<Outcome, Error> {
        self.callers.node.propose_for(self.asker().await?, op).await
    }

    /// As [`Caller::propose`], for what frees resources.
    ///
    /// # Errors
    /// As [`Caller::propose`].
    pub(crate) async fn propose_urgent(&self, op: Op) -> Result<Outcome, Error> {
        self.callers.node.propose_urgent_for(self.asker().await?, op).await
    }
}

/// A read that was allowed: good as long as users and their rights stay as they were.
pub(crate) struct Seen {
    reader: Reader,
    /// 0 = nobody in particular.
    auth_revision: u64,
}

impl Seen {
    /// To be asked when the answer is at hand: rights may have changed while it was read.
    ///
    /// # Errors
    /// `AuthOldRevision`.
    pub(crate) fn still_holds(&self) -> Result<(), Error> {
        let is_old = self.auth_revision != 0 && self.auth_revision != self.reader.auth_revision();
        if is_old && self.reader.is_auth_enabled() { Err(Error::AuthOldRevision) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flag_names_a_kind_and_its_options() {
        assert!(matches!(Tokens::from_flag("simple"), Ok(Tokens::Simple)));
        assert!(matches!(Tokens::from_flag(""), Ok(Tokens::Nothing)));
        for wrong in ["x", "jwt", "jwt,sign-method", "jwt,ttl=1m,ttl=2m", "jwt,a=b=c"] {
            let reason = Tokens::from_flag(wrong).expect_err(wrong);
            assert!(reason.starts_with(&format!("--auth-token={wrong}: ")), "{reason}");
        }
    }

    #[test]
    fn words_are_sixteen_letters_and_never_the_same() {
        let words: std::collections::BTreeSet<String> =
            (0..200).map(|_| random_word().expect("random numbers")).collect();
        assert_eq!(words.len(), 200);
        let is_word = |word: &String| word.len() == 16 && word.chars().all(|c| c.is_alphabetic());
        assert!(words.iter().all(is_word));
    }
}
