//! Tokens that users were given, by what they look like. They are no part of the state: a restart
//! forgets them, and so does a member that takes its state over from another one. Commands add and
//! remove them; their time is counted by who reads them, since nothing here knows a clock.

use std::collections::HashMap;

use parking_lot::Mutex;

use crate::reader::Reader;

/// Tokens held at most. Beyond, the one that was used least lately goes: its owner asks for another.
const TOKENS_MAX: usize = 100_000;

/// Not used yet: its time begins when somebody looks for tokens whose time is over.
const FRESH: u64 = u64::MAX;

struct Token {
    user: String,
    /// When it was used last, by the reader's clock.
    used: u64,
}

/// All tokens.
#[derive(Default)]
pub(crate) struct Tokens(Mutex<HashMap<String, Token>>);

impl Tokens {
    pub(crate) fn add(&self, token: String, user: String) {
        let mut tokens = self.0.lock();
        if tokens.len() >= TOKENS_MAX {
            let oldest = tokens.iter().min_by_key(|(_, token)| token.used);
            if let Some(oldest) = oldest.map(|(name, _)| name.clone()) {
                tokens.remove(&oldest);
            }
        }
        tokens.insert(token, Token { user, used: FRESH });
    }

    pub(crate) fn remove_user(&self, user: &str) {
        self.0.lock().retain(|_, token| token.user != user);
    }

    pub(crate) fn clear(&self) {
        self.0.lock().clear();
    }

    fn use_one(&self, token: &str, now: u64) -> Option<String> {
        let mut tokens = self.0.lock();
        let found = tokens.get_mut(token)?;
        found.used = now;
        Some(found.user.clone())
    }

    fn expire(&self, now: u64, ttl: u64) {
        self.0.lock().retain(|_, token| {
            if token.used == FRESH {
                token.used = now;
            }
            token.used.saturating_add(ttl) >= now
        });
    }
}

/// Tokens by a clock of the caller's: any count of milliseconds that does not go back.
impl Reader {
    /// Whose token this is. Its time begins anew.
    pub fn use_token(&self, token: &str, now: u64) -> Option<String> {
        self.state.tokens.use_one(token, now)
    }

    /// Forgets tokens that were not used for `ttl`.
    pub fn expire_tokens(&self, now: u64, ttl: u64) {
        self.state.tokens.expire(now, ttl);
    }

    /// Forgets all tokens.
    pub fn forget_tokens(&self) {
        self.state.tokens.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn use_prolongs_and_silence_ends() {
        let tokens = Tokens::default();
        tokens.add("a.1".to_owned(), "ann".to_owned());
        tokens.expire(1000, 300);
        assert_eq!(tokens.use_one("a.1", 1300).as_deref(), Some("ann"));
        tokens.expire(1600, 300);
        assert!(tokens.use_one("a.1", 1600).is_some(), "its time is not over yet");
        tokens.expire(1901, 300);
        assert_eq!(tokens.use_one("a.1", 1901), None);
    }

    #[test]
    fn users_lose_all_their_tokens() {
        let tokens = Tokens::default();
        for (token, user) in [("a.1", "ann"), ("b.2", "bob"), ("c.3", "ann")] {
            tokens.add(token.to_owned(), user.to_owned());
        }
        tokens.remove_user("ann");
        assert_eq!(tokens.use_one("a.1", 1), None);
        assert_eq!(tokens.use_one("b.2", 1).as_deref(), Some("bob"));
        tokens.clear();
        assert_eq!(tokens.use_one("b.2", 1), None);
    }

    #[test]
    fn there_is_room_for_so_many() {
        let tokens = Tokens::default();
        tokens.add("old".to_owned(), "ann".to_owned());
        assert!(tokens.use_one("old", 5).is_some());
        for number in 1..TOKENS_MAX {
            tokens.add(number.to_string(), "bob".to_owned());
        }
        assert!(tokens.use_one("old", 6).is_some(), "there was room");
        tokens.add("new".to_owned(), "bob".to_owned());
        assert_eq!(tokens.0.lock().len(), TOKENS_MAX);
        assert!(tokens.use_one("old", 7).is_none() && tokens.use_one("new", 7).is_some());
    }
}
