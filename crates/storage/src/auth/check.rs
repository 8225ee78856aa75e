//! Who may do what. A command is judged where it is applied, by the users of that very moment, so
//! every member comes to the same decision; reads are judged by what this member has applied. As long
//! as auth is off, everything is allowed to everybody.

use std::cell::RefCell;
use std::collections::BTreeSet;

use bytes::Bytes;
use kelson_api::Error;
use kelson_api::authpb::{Permission, User};
use kelson_api::command::Asker;
use kelson_api::command::command::Op;
use kelson_api::etcdserverpb::alarm_request::AlarmAction;
use kelson_api::etcdserverpb::request_op::Request;
use kelson_api::etcdserverpb::{DeleteRangeRequest, PutRequest, RequestOp, TxnRequest};

use super::rights::Access;
use super::{Auth, has_root_role};
use crate::lease::Leases;
use crate::mvcc::state::State;
use crate::reader::Reader;
use crate::sabotage::{self, Variant};

/// One client in front of the rules of this moment.
struct Judge<'a> {
    auth: &'a Auth,
    leases: &'a Leases,
    asker: &'a Asker,
    /// Leases to which keys may be attached. Each is gone through once, however many puts of a
    /// transaction name it: it may have many keys, and everybody waits for whoever is judged.
    writable: RefCell<BTreeSet<i64>>,
}

/// Whether a client is one who may give such a command at all. Comes before alarms, as in etcd.
pub(crate) fn check_standing(state: &State, asker: &Asker, op: &Op) -> Result<(), Error> {
    judge(state, asker, |judge| judge.standing(op))
}

/// Whether a client has a right to all keys that a command touches. Comes behind alarms.
pub(crate) fn check_keys(state: &State, asker: &Asker, op: &Op) -> Result<(), Error> {
    judge(state, asker, |judge| judge.touches(op))
}

fn judge(
    state: &State,
    asker: &Asker,
    rule: impl FnOnce(&Judge<'_>) -> Result<(), Error>,
) -> Result<(), Error> {
    if !state.auth.read().is_enabled {
        return Ok(());
    }
    let leases = state.leases.read();
    let auth = state.auth.read();
    if !auth.is_enabled {
        return Ok(());
    }
    rule(&Judge { auth: &auth, leases: &leases, asker, writable: RefCell::default() })
}

impl Judge<'_> {
    fn standing(&self, op: &Op) -> Result<(), Error> {
        match op {
            Op::Put(_) | Op::DeleteRange(_) | Op::Txn(_) => Ok(()),
            Op::LeaseGrant(_) | Op::LeaseRevoke(_) => self.anybody(),
            Op::Alarm(request) if request.action == AlarmAction::Get as i32 => self.anybody(),
            // The password was checked by who proposed it.
            Op::Login(_) => Ok(()),
            Op::Compaction(_)
            | Op::Alarm(_)
            | Op::AuthEnable(_)
            | Op::AuthDisable(_)
            | Op::UserAdd(_)
            | Op::UserDelete(_)
            | Op::UserChangePassword(_)
            | Op::UserGrantRole(_)
            | Op::UserRevokeRole(_)
            | Op::RoleAdd(_)
            | Op::RoleDelete(_)
            | Op::RoleGrantPermission(_)
            | Op::RoleRevokePermission(_) => self.admin(),
            // No client has these proposed.
            Op::LeaseCheckpoint(_)
            | Op::MembersChange(_)
            | Op::MemberPublish(_)
            | Op::ClusterVersionSet(_) => self.admin(),
        }
    }

    fn touches(&self, op: &Op) -> Result<(), Error> {
        match op {
            Op::Put(request) => self.put(request),
            Op::DeleteRange(request) => self.delete_range(request),
            Op::Txn(request) => self.txn(request),
            Op::LeaseRevoke(request) => self.lease(request.id, Access::Write),
            // All others touch no keys, or only those who may touch all of them give them.
            _ => Ok(()),
        }
    }

    /// Anybody who is known.
    fn anybody(&self) -> Result<(), Error> {
        let is_nobody = self.asker.user.is_empty() && self.asker.auth_revision == 0;
        if is_nobody { Err(Error::UserEmpty) } else { Ok(()) }
    }

    fn admin(&self) -> Result<(), Error> {
        if self.asker.user.is_empty() {
            return Err(Error::UserEmpty);
        }
        let user = self.auth.user(&self.asker.user)?;
        if has_root_role(user) { Ok(()) } else { Err(Error::PermissionDenied) }
    }

    fn keys(&self, key: &[u8], range_end: &[u8], access: Access) -> Result<(), Error> {
        let Asker { user, auth_revision } = self.asker;
        if *auth_revision == 0 {
            return Err(Error::UserEmpty);
        }
        // Rights may have been taken away since the client was recognized.
        if *auth_revision < self.auth.revision && !sabotage::is(Variant::OldRightsAccepted) {
            return Err(Error::AuthOldRevision);
        }
        let is_root = self.auth.users.get(user).is_some_and(has_root_role);
        let rights = self.auth.rights.get(user);
        if is_root || rights.is_some_and(|rights| rights.covers(key, range_end, access)) {
            return Ok(());
        }
        Err(Error::PermissionDenied)
    }

    fn put(&self, request: &PutRequest) -> Result<(), Error> {
        self.keys(&request.key, b"", Access::Write)?;
        // Who attaches a key to a lease can let it be deleted, and keep others from revoking it.
        if !sabotage::is(Variant::AttachUnchecked) {
            self.attach(request.lease)?;
        }
        if request.prev_kv && !sabotage::is(Variant::PrevKvUnchecked) {
            self.keys(&request.key, b"", Access::Read)?;
        }
        Ok(())
    }

    fn delete_range(&self, request: &DeleteRangeRequest) -> Result<(), Error> {
        self.keys(&request.key, &request.range_end, Access::Write)?;
        if request.prev_kv && !sabotage::is(Variant::PrevKvUnchecked) {
            self.keys(&request.key, &request.range_end, Access::Read)?;
        }
        Ok(())
    }

    /// Both branches, whichever will run, and all that is nested in them.
    fn txn(&self, request: &TxnRequest) -> Result<(), Error> {
        for compare in &request.compare {
            self.keys(&compare.key, &compare.range_end, Access::Read)?;
        }
        let mut operations = request.success.iter().chain(&request.failure);
        operations.try_for_each(|operation| self.operation(operation))
    }

    fn operation(&self, operation: &RequestOp) -> Result<(), Error> {
        match &operation.request {
            Some(Request::RequestRange(range)) => {
                self.keys(&range.key, &range.range_end, Access::Read)
            }
            Some(Request::RequestPut(put)) => self.put(put),
            Some(Request::RequestDeleteRange(delete)) => self.delete_range(delete),
            Some(Request::RequestTxn(_)) if sabotage::is(Variant::NestedUnchecked) => Ok(()),
            Some(Request::RequestTxn(inner)) => self.txn(inner),
            None => Ok(()),
        }
    }

    fn attach(&self, lease: i64) -> Result<(), Error> {
        if !self.writable.borrow().contains(&lease) {
            self.lease(lease, Access::Write)?;
            self.writable.borrow_mut().insert(lease);
        }
        Ok(())
    }

    /// All keys of a lease; one that is unknown has none.
    fn lease(&self, id: i64, access: Access) -> Result<(), Error> {
        if !self.leases.contains(id) || self.admin().is_ok() {
            return Ok(());
        }
        let mut keys = self.leases.keys(id).into_iter();
        keys.try_for_each(|key| self.keys(&key, b"", access))
    }
}

/// What clients are told of users, and what they may read. A client is described as in a command.
impl Reader {
    /// Whether users and their rights count.
    pub fn is_auth_enabled(&self) -> bool {
        self.state.auth.read().is_enabled
    }

    /// Rises with every change of users, roles and permissions; from 1.
    pub fn auth_revision(&self) -> u64 {
        self.state.auth.read().revision
    }

    /// A user, with the hash of his password.
    ///
    /// # Errors
    /// `UserNotFound`.
    pub fn user(&self, name: &str) -> Result<User, Error> {
        self.state.auth.read().user(name).cloned()
    }

    /// Names of all users, ascending.
    pub fn users(&self) -> Vec<String> {
        self.state.auth.read().users.keys().cloned().collect()
    }

    /// What a role allows, by ascending key.
    ///
    /// # Errors
    /// `RoleNotFound`.
    pub fn role(&self, name: &str) -> Result<Vec<Permission>, Error> {
        self.state.auth.read().permissions(name)
    }

    /// Names of all roles, ascending.
    pub fn roles(&self) -> Vec<String> {
        self.state.auth.read().roles.keys().cloned().collect()
    }

    /// Whether a user holds a role.
    pub fn has_role(&self, user: &str, role: &str) -> bool {
        let auth = self.state.auth.read();
        auth.users.get(user).is_some_and(|user| user.roles.iter().any(|held| held == role))
    }

    /// Whether a client may do what only the role root may.
    ///
    /// # Errors
    /// `UserEmpty`, `UserNotFound`, `PermissionDenied`.
    pub fn check_admin(&self, asker: &Asker) -> Result<(), Error> {
        judge(&self.state, asker, |judge| judge.admin())
    }

    /// Whether a client may read all keys of a range.
    ///
    /// # Errors
    /// `UserEmpty`, `AuthOldRevision`, `PermissionDenied`.
    pub fn check_range(&self, asker: &Asker, key: &[u8], range_end: &[u8]) -> Result<(), Error> {
        judge(&self.state, asker, |judge| judge.keys(key, range_end, Access::Read))
    }

    /// Whether a client may run a transaction.
    ///
    /// # Errors
    /// As [`Reader::check_range`].
    pub fn check_txn(&self, asker: &Asker, request: &TxnRequest) -> Result<(), Error> {
        judge(&self.state, asker, |judge| judge.txn(request))
    }

    /// Whether a client may renew a lease: it may write all its keys.
    ///
    /// # Errors
    /// As [`Reader::check_range`].
    pub fn check_renewal(&self, asker: &Asker, id: i64) -> Result<(), Error> {
        judge(&self.state, asker, |judge| judge.lease(id, Access::Write))
    }

    /// Whether a client may read all of these keys.
    ///
    /// # Errors
    /// As [`Reader::check_range`].
    pub fn check_keys(&self, asker: &Asker, keys: &[Bytes]) -> Result<(), Error> {
        let rule = |judge: &Judge<'_>| {
            if judge.admin().is_ok() {
                return Ok(());
            }
            keys.iter().try_for_each(|key| judge.keys(key, b"", Access::Read))
        };
        judge(&self.state, asker, rule)
    }

    /// Whether a client may see the keys of these leases: it may read all of them.
    ///
    /// # Errors
    /// As [`Reader::check_range`].
    pub fn check_lease_keys(&self, asker: &Asker, ids: &[i64]) -> Result<(), Error> {
        let rule = |judge: &Judge<'_>| ids.iter().try_for_each(|id| judge.lease(*id, Access::Read));
        judge(&self.state, asker, rule)
    }
}

#[cfg(test)]
mod tests {
    use kelson_api::authpb::{Role, permission::Type};

    use super::*;
    use crate::auth::AuthRows;
    use crate::types::LeaseRow;

    /// Ann may write what begins with `w`.
    fn users() -> Auth {
        let perm_type = Type::Readwrite as i32;
        let permission = Permission { perm_type, key: "w".into(), range_end: "x".into() };
        let role = Role { name: "w".into(), key_permission: vec![permission] };
        let user = User { name: "ann".into(), roles: vec!["w".to_owned()], ..Default::default() };
        let (users, roles) = (vec![user], vec![role]);
        Auth::new(AuthRows { enabled: Some(true), revision: Some(1), users, roles })
    }

    #[test]
    fn a_lease_is_gone_through_once() {
        let (auth, mut leases) = (users(), Leases::default());
        for (id, key) in [(1, b"w"), (2, b"a")] {
            leases.put(LeaseRow { id, ttl: 5, remaining_ttl: 0 });
            leases.reattach(key, 0, id);
        }
        let asker = Asker { user: "ann".to_owned(), auth_revision: 1 };
        let writable = RefCell::default();
        let judge = Judge { auth: &auth, leases: &leases, asker: &asker, writable };
        assert_eq!(judge.attach(1), Ok(()));
        assert_eq!(judge.attach(2), Err(Error::PermissionDenied));
        assert_eq!(*judge.writable.borrow(), BTreeSet::from([1]), "what was found stays known");
        judge.writable.borrow_mut().insert(2);
        assert_eq!(judge.attach(2), Ok(()), "what is known is not looked for again");
    }
}
