//! Tokens that say who was recognized and at which auth revision, signed by a key of the operator's
//! (RFC 7519). Only the algorithm of the flag is accepted, whatever a token says of itself. Keys are
//! read once; no state is kept, so every member with the key knows every token.

mod keys;

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use kelson_api::Error;
use kelson_api::command::Asker;
use serde_json::{Value, json};

use keys::{Algorithm, Signer, Verifier};

/// Life of a token if the flag names none. Source: etcd.
const TTL: Duration = Duration::from_secs(300);

/// Makes and checks signed tokens.
pub struct Jwt {
    algorithm: Algorithm,
    verifier: Verifier,
    /// `None` = this member only checks.
    signer: Option<Signer>,
    ttl: Duration,
}

impl std::fmt::Debug for Jwt {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Jwt").field("algorithm", &self.algorithm.name()).finish_non_exhaustive()
    }
}

impl Jwt {
    /// From the options of `--auth-token=jwt,...`: `sign-method`, `priv-key`, `pub-key`, `ttl`.
    ///
    /// # Errors
    /// What is missing or unusable, and what to give instead.
    pub fn new(options: &[(&str, &str)]) -> Result<Self, String> {
        let option = |name: &str| {
            let mut options = options.iter();
            options.find(|(known, value)| *known == name && !value.is_empty()).map(|(_, it)| *it)
        };
        let is_known = |name: &str| ["sign-method", "priv-key", "pub-key", "ttl"].contains(&name);
        for (name, _) in options.iter().filter(|(name, _)| !is_known(name)) {
            tracing::warn!(option = name, "unknown JWT option");
        }
        let ttl = option("ttl").map_or(Ok(TTL), |ttl| {
            crate::config::parse_duration(ttl)
                .ok_or_else(|| format!("ttl \"{ttl}\" is no duration like 10m"))
        })?;
        let method = option("sign-method").ok_or("sign-method is missing, as in RS256")?;
        let algorithm = Algorithm::by_name(method)?;
        let read = |name: &str| {
            let path = option(name);
            let bytes = path.map(|path| {
                std::fs::read(path).map_err(|error| format!("cannot read {name} {path}: {error}"))
            });
            bytes.transpose()
        };
        let (private, public) = (read("priv-key")?, read("pub-key")?);
        let (verifier, signer) = keys::load(algorithm, private.as_deref(), public.as_deref())?;
        Ok(Self { algorithm, verifier, signer, ttl })
    }

    /// A token for a user. `now` in seconds since 1970.
    ///
    /// # Errors
    /// `VerifyOnlyKey`, `AuthFailed` if signing fails.
    pub fn sign(&self, user: &str, revision: u64, now: u64) -> Result<String, Error> {
        let signer = self.signer.as_ref().ok_or(Error::VerifyOnlyKey)?;
        let head = json!({ "alg": self.algorithm.name(), "typ": "JWT" });
        let exp = now.saturating_add(self.ttl.as_secs());
        let claims = json!({ "exp": exp, "revision": revision, "username": user });
        let part = |json: Value| URL_SAFE_NO_PAD.encode(json.to_string());
        let signed = format!("{}.{}", part(head), part(claims));
        let signature = signer.sign(signed.as_bytes()).map_err(|()| {
            tracing::error!(user, "a token cannot be signed");
            Error::AuthFailed
        })?;
        Ok(format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature)))
    }

    /// Whose token this is, and the revision at which he was recognized. `now` as in [`Jwt::sign`].
    ///
    /// # Errors
    /// `InvalidAuthToken`.
    pub fn verify(&self, token: &str, now: u64) -> Result<Asker, Error> {
        self.read(token, now).ok_or(Error::InvalidAuthToken)
    }

    fn read(&self, token: &str, now: u64) -> Option<Asker> {
        let (signed, signature) = token.rsplit_once('.')?;
        let (head, claims) = signed.split_once('.')?;
        let object = |part: &str| -> Option<Value> {
            let bytes = URL_SAFE_NO_PAD.decode(part).ok()?;
            serde_json::from_slice(&bytes).ok()
        };
        // Before anything is computed: a token must not choose how it is checked.
        if object(head)?.get("alg")?.as_str()? != self.algorithm.name() {
            return None;
        }
        let signature = URL_SAFE_NO_PAD.decode(signature).ok()?;
        self.verifier.verify(signed.as_bytes(), &signature)?;
        let claims = object(claims)?;
        let at = now as f64;
        let is_alive = date(&claims, "exp")?.is_none_or(|end| at < end);
        let has_begun = date(&claims, "nbf")?.is_none_or(|begin| at >= begin);
        if !is_alive || !has_begun {
            return None;
        }
        let user = claims.get("username")?.as_str()?.to_owned();
        // As etcd reads it: any number, and no more of it than fits.
        let auth_revision = claims.get("revision")?.as_f64()? as u64;
        Some(Asker { user, auth_revision })
    }
}

/// A time in claims: `None` = something else than a number stands there; none or 0 is no limit.
fn date(claims: &Value, name: &str) -> Option<Option<f64>> {
    match claims.get(name) {
        None => Some(None),
        Some(value) => value.as_f64().map(|time| (time != 0.0).then_some(time)),
    }
}

#[cfg(test)]
mod tests;
