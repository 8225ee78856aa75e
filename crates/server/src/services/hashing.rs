//! Passwords on their way to a hash and back. Both are meant to be slow, and anybody may ask for a
//! check: they run on threads of their own, on half of the processors at most, so that members hear
//! of one another however many passwords are tried; and only so many wait. It knows no user.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use kelson_api::Error;
use tokio::sync::Semaphore;
use tonic::Status;

use super::blocking::Blocking;

/// Bytes of a password that its hash takes in.
const PASSWORD_MAX: usize = 72;

/// Passwords that wait or are computed; one more answers `too many requests`.
const WAITING_MAX: usize = 512;

/// Hashes passwords and checks them.
pub(super) struct Hashing {
    /// Logarithm of the rounds.
    cost: u32,
    blocking: Blocking,
    waiting: Semaphore,
}

impl Hashing {
    pub(super) fn new(cost: u32) -> Self {
        let processors = std::thread::available_parallelism().map_or(1, |count| count.get());
        Self::with(cost, (processors / 2).max(1), WAITING_MAX)
    }

    fn with(cost: u32, at_once: usize, waiting: usize) -> Self {
        Self { cost, blocking: Blocking::with(at_once), waiting: Semaphore::new(waiting) }
    }

    /// The hash of a password, as a request carries it.
    ///
    /// # Errors
    /// `PasswordTooLong`, `TooManyRequests`.
    pub(super) async fn hash(&self, password: String) -> Result<String, Status> {
        if password.len() > PASSWORD_MAX {
            return Err(Error::PasswordTooLong.into());
        }
        let cost = self.cost;
        let hashed = self.run(move || bcrypt::hash_with_result(password, cost)).await?;
        let parts = hashed.map_err(|error| {
            tracing::error!(%error, "a password cannot be hashed");
            Status::unknown(format!("bcrypt: {error}"))
        })?;
        // The version that etcd writes.
        Ok(STANDARD.encode(parts.format_for_version(bcrypt::Version::TwoA)))
    }

    /// Whether a password is the one that was hashed. A hash that is none fits no password.
    ///
    /// # Errors
    /// `TooManyRequests`.
    pub(super) async fn check(&self, password: String, hash: Bytes) -> Result<bool, Status> {
        self.run(move || {
            let hash = str::from_utf8(&hash).unwrap_or_default();
            bcrypt::verify(password, hash).unwrap_or(false)
        })
        .await
    }

    async fn run<T, F>(&self, work: F) -> Result<T, Status>
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        let _place = self.waiting.try_acquire().map_err(|_| Error::TooManyRequests)?;
        self.blocking.run(work).await
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[tokio::test]
    async fn a_hash_fits_its_password_alone() {
        let hashing = Hashing::new(4);
        let hashed = hashing.hash("secret".to_owned()).await.expect("a hash");
        let hash = Bytes::from(STANDARD.decode(hashed).expect("base64"));
        assert!(hash.starts_with(b"$2a$04$"), "{hash:?}");
        for (password, is_right) in [("secret", true), ("Secret", false), ("", false)] {
            let found = hashing.check(password.to_owned(), hash.clone()).await;
            assert_eq!(found.expect("checked"), is_right, "{password}");
        }
        for none in ["", "secret", "$2a$04$short"] {
            let found =
                hashing.check("secret".to_owned(), Bytes::from_static(none.as_bytes())).await;
            assert!(!found.expect("checked"), "{none}");
        }
        let long = hashing.hash("x".repeat(PASSWORD_MAX + 1)).await.expect_err("too long");
        assert_eq!(long.message(), Error::PasswordTooLong.text());
    }

    #[tokio::test]
    async fn only_so_many_wait() {
        let hashing = Arc::new(Hashing::with(4, 1, 2));
        let (open, gate) = std::sync::mpsc::channel::<()>();
        let slow = Arc::clone(&hashing);
        let first = tokio::spawn(async move { slow.run(move || gate.recv().is_ok()).await });
        while hashing.waiting.available_permits() > 1 {
            tokio::task::yield_now().await;
        }
        let queued = Arc::clone(&hashing);
        let second = tokio::spawn(async move { queued.run(|| true).await });
        while hashing.waiting.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        let third = hashing.run(|| true).await.expect_err("no place is left");
        assert_eq!(third.message(), Error::TooManyRequests.text());
        assert!(!second.is_finished(), "one at a time");
        open.send(()).expect("the first one waits for it");
        assert!(first.await.expect("no panic").expect("done"));
        assert!(second.await.expect("no panic").expect("done"));
        assert!(hashing.run(|| true).await.expect("there is room again"));
    }
}
