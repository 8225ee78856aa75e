//! Users, roles and what roles allow, as the log says them, and the rules by which they change. The
//! proposing member has made the hash of a password: nothing here is random and nothing takes long.
//! Who may do what is decided in `check`; tokens, which are no part of the state, are in `tokens`.

pub(crate) mod check;
mod rights;
pub(crate) mod tokens;

use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use kelson_api::authpb::{Permission, Role, User, UserAddOptions, permission};
use kelson_api::command::Login;
use kelson_api::command::command::Op;
use kelson_api::etcdserverpb::{
    AuthRoleGrantPermissionRequest, AuthRoleRevokePermissionRequest, AuthUserAddRequest,
    AuthUserChangePasswordRequest, AuthUserGrantRoleRequest, AuthUserRevokeRoleRequest,
};
use kelson_api::{Error, Message};

use crate::mvcc::state::State;
use crate::sabotage::{self, Variant};
use crate::types::{Delta, MetaChange, Reply};
use rights::Rights;

/// The user and the role that may do everything.
const ROOT: &str = "root";

/// The revision of a store in which nothing was ever changed.
const FIRST_REVISION: u64 = 1;

/// Users and roles as disk holds them.
#[derive(Clone, Default, PartialEq, Debug)]
pub(crate) struct AuthRows {
    /// `None` = never enabled.
    pub(crate) enabled: Option<bool>,
    /// `None` = nothing was ever changed.
    pub(crate) revision: Option<u64>,
    /// By ascending name.
    pub(crate) users: Vec<User>,
    /// By ascending name.
    pub(crate) roles: Vec<Role>,
}

impl AuthRows {
    /// The auth revision: 1 in a store that never knew users.
    pub(crate) fn revision(&self) -> u64 {
        self.revision.unwrap_or(FIRST_REVISION)
    }
}

/// Users, roles, and what follows from both.
pub(crate) struct Auth {
    is_enabled: bool,
    revision: u64,
    users: BTreeMap<String, User>,
    roles: BTreeMap<String, Role>,
    /// What each user may do by all of his roles. Made anew when one of them changes.
    rights: BTreeMap<String, Rights>,
}

impl Default for Auth {
    fn default() -> Self {
        Self::new(AuthRows::default())
    }
}

/// The name of a user or a role as a key.
pub(crate) fn text(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}

fn has_root_role(user: &User) -> bool {
    user.roles.iter().any(|role| role == ROOT)
}

impl Auth {
    pub(crate) fn new(rows: AuthRows) -> Self {
        let revision = rows.revision();
        let mut auth = Self {
            is_enabled: rows.enabled.unwrap_or(false) && !sabotage::is(Variant::AuthOffAtStart),
            revision,
            users: rows.users.into_iter().map(|user| (text(&user.name), user)).collect(),
            roles: rows.roles.into_iter().map(|role| (text(&role.name), role)).collect(),
            rights: BTreeMap::new(),
        };
        let names: Vec<String> = auth.users.keys().cloned().collect();
        names.iter().for_each(|name| auth.refresh(name));
        auth
    }

    /// Computes the rights of one user.
    fn refresh(&mut self, name: &str) {
        let Some(user) = self.users.get(name) else {
            self.rights.remove(name);
            return;
        };
        // A role that does not exist, as root's often does not, allows nothing by itself.
        let roles = user.roles.iter().filter_map(|role| self.roles.get(role));
        let rights = Rights::of(roles.flat_map(|role| &role.key_permission));
        self.rights.insert(name.to_owned(), rights);
    }

    /// Records a change of users or roles.
    fn commit(&mut self, delta: &mut Delta, changes: impl IntoIterator<Item = MetaChange>) {
        self.revision += 1;
        for change in changes {
            delta.bytes += match &change {
                MetaChange::UserPut(user) => user.encoded_len(),
                MetaChange::RolePut(role) => role.encoded_len(),
                _ => 0,
            };
            delta.meta.push(change);
        }
        delta.meta.push(MetaChange::AuthRevision(self.revision));
    }

    fn put_user(&mut self, delta: &mut Delta, user: User) {
        let name = text(&user.name);
        self.users.insert(name.clone(), user.clone());
        self.refresh(&name);
        self.commit(delta, [MetaChange::UserPut(user)]);
    }

    fn put_role(&mut self, delta: &mut Delta, role: Role) {
        let name = text(&role.name);
        self.roles.insert(name.clone(), role.clone());
        let holders = self.users.iter().filter(|(_, user)| user.roles.contains(&name));
        let holders: Vec<String> = holders.map(|(name, _)| name.clone()).collect();
        holders.iter().for_each(|holder| self.refresh(holder));
        self.commit(delta, [MetaChange::RolePut(role)]);
    }

    fn user(&self, name: &str) -> Result<&User, Error> {
        self.users.get(name).ok_or(Error::UserNotFound)
    }

    fn role(&self, name: &str) -> Result<&Role, Error> {
        self.roles.get(name).ok_or(Error::RoleNotFound)
    }

    fn enable(&mut self, delta: &mut Delta) -> Result<(), Error> {
        if self.is_enabled {
            return Ok(());
        }
        let root = self.users.get(ROOT).ok_or(Error::RootUserNotExist)?;
        if !has_root_role(root) {
            return Err(Error::RootRoleNotExist);
        }
        self.is_enabled = true;
        delta.meta.push(MetaChange::AuthEnabled(true));
        Ok(())
    }

    fn disable(&mut self, delta: &mut Delta) {
        if self.is_enabled {
            self.is_enabled = false;
            self.commit(delta, [MetaChange::AuthEnabled(false)]);
        }
    }

    /// Whether a user whose password was right may have a token.
    fn check_login(&self, name: &str) -> Result<(), Error> {
        if !self.is_enabled {
            return Err(Error::AuthNotEnabled);
        }
        match self.users.get(name) {
            Some(user) if !has_no_password(user) => Ok(()),
            _ => Err(Error::AuthFailed),
        }
    }

    fn add_user(&mut self, delta: &mut Delta, request: &AuthUserAddRequest) -> Result<(), Error> {
        if request.name.is_empty() {
            return Err(Error::UserEmpty);
        }
        if self.users.contains_key(&request.name) {
            return Err(Error::UserExists);
        }
        let options = request.options.unwrap_or_default();
        let password = match options.no_password {
            true => Bytes::new(),
            false => hash_in(&request.hashed_password)?,
        };
        let name = Bytes::copy_from_slice(request.name.as_bytes());
        self.put_user(delta, User { name, password, roles: Vec::new(), options: Some(options) });
        Ok(())
    }

    fn delete_user(&mut self, delta: &mut Delta, name: &str) -> Result<(), Error> {
        if self.is_enabled && name == ROOT {
            return Err(Error::InvalidAuthManagement);
        }
        self.users.remove(name).ok_or(Error::UserNotFound)?;
        self.refresh(name);
        self.commit(delta, [MetaChange::UserRemove(name.to_owned())]);
        Ok(())
    }

    fn change_password(
        &mut self,
        delta: &mut Delta,
        request: &AuthUserChangePasswordRequest,
    ) -> Result<(), Error> {
        let mut user = self.user(&request.name)?.clone();
        user.password = match has_no_password(&user) {
            true => Bytes::new(),
            false => hash_in(&request.hashed_password)?,
        };
        self.put_user(delta, user);
        Ok(())
    }

    fn grant_role(
        &mut self,
        delta: &mut Delta,
        request: &AuthUserGrantRoleRequest,
    ) -> Result<(), Error> {
        let mut user = self.user(&request.user)?.clone();
        // The role root means something even where it was never added.
        if request.role != ROOT {
            self.role(&request.role)?;
        }
        if user.roles.contains(&request.role) {
            return Ok(());
        }
        user.roles.push(request.role.clone());
        user.roles.sort_unstable();
        self.put_user(delta, user);
        Ok(())
    }

    fn revoke_role(
        &mut self,
        delta: &mut Delta,
        request: &AuthUserRevokeRoleRequest,
    ) -> Result<(), Error> {
        if self.is_enabled && request.name == ROOT && request.role == ROOT {
            return Err(Error::InvalidAuthManagement);
        }
        let mut user = self.user(&request.name)?.clone();
        if !user.roles.contains(&request.role) {
            return Err(Error::RoleNotGranted);
        }
        user.roles.retain(|role| *role != request.role);
        self.put_user(delta, user);
        Ok(())
    }

    fn add_role(&mut self, delta: &mut Delta, name: &str) -> Result<(), Error> {
        if name.is_empty() {
            return Err(Error::RoleEmpty);
        }
        if self.roles.contains_key(name) {
            return Err(Error::RoleExists);
        }
        let name = Bytes::copy_from_slice(name.as_bytes());
        self.put_role(delta, Role { name, key_permission: Vec::new() });
        Ok(())
    }

    fn delete_role(&mut self, delta: &mut Delta, name: &str) -> Result<(), Error> {
        if self.is_enabled && name == ROOT {
            return Err(Error::InvalidAuthManagement);
        }
        self.roles.remove(name).ok_or(Error::RoleNotFound)?;
        let mut changes = vec![MetaChange::RoleRemove(name.to_owned())];
        let mut losers = Vec::new();
        for (user_name, user) in &mut self.users {
            let before = user.roles.len();
            user.roles.retain(|role| role != name);
            if user.roles.len() != before {
                losers.push(user_name.clone());
                changes.push(MetaChange::UserPut(user.clone()));
            }
        }
        losers.iter().for_each(|loser| self.refresh(loser));
        self.commit(delta, changes);
        Ok(())
    }

    fn grant_permission(
        &mut self,
        delta: &mut Delta,
        request: &AuthRoleGrantPermissionRequest,
    ) -> Result<(), Error> {
        let asked = request.perm.as_ref().ok_or(Error::PermissionNotGiven)?;
        if !rights::is_valid_range(&asked.key, &asked.range_end) {
            return Err(Error::InvalidAuthManagement);
        }
        let mut role = self.role(&request.name)?.clone();
        // Copied: the bytes may be a slice of a whole log batch.
        let permission = Permission {
            perm_type: asked.perm_type,
            key: Bytes::copy_from_slice(&asked.key),
            range_end: Bytes::copy_from_slice(&asked.range_end),
        };
        let is_same = |known: &Permission| {
            known.key == permission.key && known.range_end == permission.range_end
        };
        match role.key_permission.iter().position(is_same) {
            Some(at) => role.key_permission[at] = permission,
            None => {
                let at = role.key_permission.partition_point(|known| known.key <= permission.key);
                role.key_permission.insert(at, permission);
            }
        }
        self.put_role(delta, role);
        Ok(())
    }

    fn revoke_permission(
        &mut self,
        delta: &mut Delta,
        request: &AuthRoleRevokePermissionRequest,
    ) -> Result<(), Error> {
        let mut role = self.role(&request.role)?.clone();
        let before = role.key_permission.len();
        let is_other =
            |known: &Permission| known.key != request.key || known.range_end != request.range_end;
        role.key_permission.retain(is_other);
        if role.key_permission.len() == before {
            return Err(Error::PermissionNotGranted);
        }
        self.put_role(delta, role);
        Ok(())
    }

    /// What a role allows, as clients are told: the role root shows that it allows everything.
    fn permissions(&self, name: &str) -> Result<Vec<Permission>, Error> {
        let role = self.role(name)?;
        if name != ROOT {
            return Ok(role.key_permission.clone());
        }
        let perm_type = permission::Type::Readwrite as i32;
        let (key, range_end) = (Bytes::new(), Bytes::from_static(b"\0"));
        Ok(vec![Permission { perm_type, key, range_end }])
    }
}

fn has_no_password(user: &User) -> bool {
    user.options.unwrap_or_default() == UserAddOptions { no_password: true }
}

/// The hash that the proposing member put into a request.
fn hash_in(hashed: &str) -> Result<Bytes, Error> {
    STANDARD.decode(hashed).map(Bytes::from).map_err(|_| Error::NoPasswordUser)
}

/// Carries out a command on users, roles, or whether they count at all.
pub(crate) fn carry_out(state: &State, delta: &mut Delta, op: &Op) -> Result<Reply, Error> {
    let mut auth = state.auth.write();
    match op {
        Op::AuthEnable(_) => auth.enable(delta)?,
        Op::AuthDisable(_) => {
            auth.disable(delta);
            state.tokens.clear();
        }
        Op::Login(login) => {
            auth.check_login(&login.user)?;
            return Ok(Reply::Login(log_in(state, delta, login)));
        }
        Op::UserAdd(request) => auth.add_user(delta, request)?,
        Op::UserDelete(request) => {
            auth.delete_user(delta, &request.name)?;
            state.tokens.remove_user(&request.name);
        }
        Op::UserChangePassword(request) => {
            auth.change_password(delta, request)?;
            if !sabotage::is(Variant::TokenOutlivesPassword) {
                state.tokens.remove_user(&request.name);
            }
        }
        Op::UserGrantRole(request) => auth.grant_role(delta, request)?,
        Op::UserRevokeRole(request) => auth.revoke_role(delta, request)?,
        Op::RoleAdd(request) => auth.add_role(delta, &request.name)?,
        Op::RoleDelete(request) => auth.delete_role(delta, &request.role)?,
        Op::RoleGrantPermission(request) => auth.grant_permission(delta, request)?,
        Op::RoleRevokePermission(request) => auth.revoke_permission(delta, request)?,
        _ => return Err(Error::UnknownMethod),
    }
    Ok(Reply::Auth)
}

/// Gives a user a token that every member knows. The index in it tells a member how far it must have
/// applied the log before it can say that it does not know the token.
fn log_in(state: &State, delta: &Delta, login: &Login) -> String {
    let token = format!("{}.{}", login.token, delta.id.index);
    state.tokens.add(token.clone(), login.user.clone());
    token
}
