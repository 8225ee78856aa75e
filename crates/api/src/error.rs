//! Every error that a client of etcd can see: gRPC code and exact text, one row each. Clients match
//! on the text, so a row is a promise. This table knows no cause: the crates to the left choose a row.

/// gRPC status codes that the table uses, by their wire numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum Code {
    /// The call was canceled.
    Canceled = 1,
    /// Errors that etcd itself sends without a code of their own.
    Unknown = 2,
    /// The request is wrong whatever the state.
    InvalidArgument = 3,
    /// The proposal was surely not accepted in time.
    DeadlineExceeded = 4,
    /// Something named does not exist.
    NotFound = 5,
    /// The caller may not do this.
    PermissionDenied = 7,
    /// A limit is reached.
    ResourceExhausted = 8,
    /// The state does not allow it.
    FailedPrecondition = 9,
    /// A revision outside the readable window.
    OutOfRange = 11,
    /// Not offered.
    Unimplemented = 12,
    /// A bug or a broken frame.
    Internal = 13,
    /// Try again; the outcome of a write is unknown.
    Unavailable = 14,
    /// Data is corrupt.
    DataLoss = 15,
    /// No valid credentials.
    Unauthenticated = 16,
}

macro_rules! errors {
    ($($(#[$doc:meta])* $name:ident = $code:ident, $text:literal;)*) => {
        /// An error as a client sees it. Source: the status table of etcd 3.7's client library.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
        pub enum Error {
            $($(#[$doc])* #[error($text)] $name,)*
        }

        impl Error {
            /// Every row, in table order.
            pub const ALL: &'static [Error] = &[$(Error::$name,)*];

            /// gRPC code on the wire.
            pub const fn code(self) -> Code {
                match self { $(Error::$name => Code::$code,)* }
            }

            /// Exact text on the wire.
            pub const fn text(self) -> &'static str {
                match self { $(Error::$name => $text,)* }
            }
        }
    };
}

errors! {
    /// Range, Put, DeleteRange or Compare without a key.
    EmptyKey = InvalidArgument, "etcdserver: key is not provided";
    /// ignore_value or ignore_lease on a missing key; an empty operation in a transaction.
    KeyNotFound = InvalidArgument, "etcdserver: key not found";
    /// ignore_value together with a value.
    ValueProvided = InvalidArgument, "etcdserver: value is provided";
    /// ignore_lease together with a lease.
    LeaseProvided = InvalidArgument, "etcdserver: lease is provided";
    /// More operations or compares than max-txn-ops.
    TooManyOps = InvalidArgument, "etcdserver: too many operations in txn request";
    /// The same key changed twice in one transaction.
    DuplicateKey = InvalidArgument, "etcdserver: duplicate key given in txn request";
    /// Unknown sort order or target.
    InvalidSortOption = InvalidArgument, "etcdserver: invalid sort option";
    /// The client-api-version header is not UTF-8.
    InvalidClientApiVersion = InvalidArgument, "etcdserver: invalid client api version";
    /// A revision below the compaction revision.
    Compacted = OutOfRange, "etcdserver: mvcc: required revision has been compacted";
    /// A revision above the current one.
    FutureRevision = OutOfRange, "etcdserver: mvcc: required revision is a future revision";
    /// The quota is reached or the NOSPACE alarm is on.
    NoSpace = ResourceExhausted, "etcdserver: mvcc: database space exceeded";
    /// The proposal is larger than max-request-bytes.
    RequestTooLarge = InvalidArgument, "etcdserver: request is too large";
    /// RangeStream asked to sort.
    StreamSort = Unimplemented, "RangeStream does not support custom sort orders";
    /// RangeStream asked to filter by revision.
    StreamFilter = Unimplemented, "RangeStream does not support revision filters";
    /// The named lease does not exist.
    LeaseNotFound = NotFound, "etcdserver: requested lease not found";
    /// The asked lease id is taken.
    LeaseExists = FailedPrecondition, "etcdserver: lease already exists";
    /// TTL above nine thousand million seconds.
    LeaseTtlTooLarge = OutOfRange, "etcdserver: too large lease TTL";
    /// A lease call waited too long for the local apply to catch up.
    TimeoutWaitAppliedIndex = Unavailable, "etcdserver: request timed out, waiting for the applied index took too long";
    /// The client canceled a watch stream.
    WatchCanceled = Canceled, "etcdserver: watch canceled";
    /// A member with this id exists.
    MemberExists = FailedPrecondition, "etcdserver: member ID already exist";
    /// A peer URL is in use.
    PeerUrlExists = FailedPrecondition, "etcdserver: Peer URLs already exists";
    /// Peer URLs missing or malformed.
    MemberBadUrls = InvalidArgument, "etcdserver: given member URLs are invalid";
    /// Unknown or removed member.
    MemberNotFound = NotFound, "etcdserver: member not found";
    /// Promotion of a voter.
    MemberNotLearner = FailedPrecondition, "etcdserver: can only promote a learner member";
    /// Promotion of a learner that lags.
    LearnerNotReady = FailedPrecondition, "etcdserver: can only promote a learner member which is in sync with leader";
    /// More learners than max-learners.
    TooManyLearners = FailedPrecondition, "etcdserver: too many learner members in cluster";
    /// A change would leave fewer started members than a quorum.
    NotEnoughStartedMembers = Unknown, "etcdserver: re-configuration failed due to not enough started members";
    /// The member is not connected to a quorum long enough.
    UnhealthyCluster = Unavailable, "etcdserver: unhealthy cluster";
    /// A peer of another cluster.
    ClusterIdMismatch = FailedPrecondition, "etcdserver: cluster ID mismatch";
    /// AuthEnable without user root.
    RootUserNotExist = FailedPrecondition, "etcdserver: root user does not exist";
    /// AuthEnable while root lacks role root.
    RootRoleNotExist = FailedPrecondition, "etcdserver: root user does not have root role";
    /// UserAdd of an existing name.
    UserExists = FailedPrecondition, "etcdserver: user name already exists";
    /// No user on the request while auth is on, or an empty name.
    UserEmpty = InvalidArgument, "etcdserver: user name is empty";
    /// Unknown user.
    UserNotFound = FailedPrecondition, "etcdserver: user name not found";
    /// RoleAdd of an existing name.
    RoleExists = FailedPrecondition, "etcdserver: role name already exists";
    /// Unknown role.
    RoleNotFound = FailedPrecondition, "etcdserver: role name not found";
    /// RoleAdd without a name.
    RoleEmpty = InvalidArgument, "etcdserver: role name is empty";
    /// Wrong user or password.
    AuthFailed = InvalidArgument, "etcdserver: authentication failed, invalid user ID or password";
    /// RoleGrantPermission without a permission.
    PermissionNotGiven = InvalidArgument, "etcdserver: permission not given";
    /// The user may not do this.
    PermissionDenied = PermissionDenied, "etcdserver: permission denied";
    /// UserRevokeRole of a role not granted.
    RoleNotGranted = FailedPrecondition, "etcdserver: role is not granted to the user";
    /// RoleRevokePermission of a permission not granted.
    PermissionNotGranted = FailedPrecondition, "etcdserver: permission is not granted to the role";
    /// Authenticate while auth is off.
    AuthNotEnabled = FailedPrecondition, "etcdserver: authentication is not enabled";
    /// Bad token.
    InvalidAuthToken = Unauthenticated, "etcdserver: invalid auth token";
    /// Root user or role cannot be removed while auth is on; bad permission range.
    InvalidAuthManagement = InvalidArgument, "etcdserver: invalid auth management";
    /// The auth data changed meanwhile.
    AuthOldRevision = InvalidArgument, "etcdserver: revision of auth store is old";
    /// A password was given for a user that has none; a hash that is none.
    NoPasswordUser = Unknown, "auth: authentication failed, password was given for no password user";
    /// This member can check tokens but not make them.
    VerifyOnlyKey = Unknown, "auth: token signing attempted with verify-only key";
    /// The hash takes in no more of a password. Source: the hashing library of etcd.
    PasswordTooLong = Unknown, "bcrypt: password length exceeds 72 bytes";
    /// No leader is known.
    NoLeader = Unavailable, "etcdserver: no leader";
    /// MoveLeader asked of a follower.
    NotLeader = FailedPrecondition, "etcdserver: not leader";
    /// The leader changed during a linearizable read.
    LeaderChanged = Unavailable, "etcdserver: leader changed";
    /// MoveLeader to an unknown member or a learner.
    BadLeaderTransferee = FailedPrecondition, "etcdserver: bad leader transferee";
    /// MoveLeader took too long.
    TimeoutLeaderTransfer = Unknown, "etcdserver: request timed out, leader transfer took too long";
    /// The API is not enabled at this cluster version.
    NotCapable = FailedPrecondition, "etcdserver: not capable";
    /// The server is stopping.
    Stopped = Unavailable, "etcdserver: server stopped";
    /// No result within the request timeout.
    Timeout = Unavailable, "etcdserver: request timed out";
    /// As Timeout, and the leader was lost meanwhile.
    TimeoutLeaderFailure = Unavailable, "etcdserver: request timed out, possibly due to previous leader failure";
    /// As Timeout, and the quorum was not reachable.
    TimeoutConnectionLost = Unavailable, "etcdserver: request timed out, possibly due to connection lost";
    /// The CORRUPT alarm is on.
    Corrupt = DataLoss, "etcdserver: corrupt cluster";
    /// A learner was asked for something only voters serve.
    NotSupportedForLearner = FailedPrecondition, "etcdserver: rpc not supported for learner";
    /// The apply backlog is too long.
    TooManyRequests = Unknown, "etcdserver: too many requests";
    /// Canceled inside the server.
    RequestCanceled = Canceled, "etcdserver: request canceled";
    /// The proposal was not accepted by any leader within the request timeout.
    ProposalNotAccepted = DeadlineExceeded, "context deadline exceeded";
    /// Unparsable downgrade target.
    DowngradeVersionFormat = InvalidArgument, "etcdserver: wrong downgrade target version format";
    /// Downgrade target is not one minor below.
    DowngradeTarget = InvalidArgument, "etcdserver: invalid downgrade target version";
    /// No cluster version is decided.
    ClusterVersionNotFound = FailedPrecondition, "etcdserver: cluster version not found during downgrade";
    /// A downgrade job is running.
    DowngradeInProgress = FailedPrecondition, "etcdserver: cluster has a downgrade job in progress";
    /// Unknown enum of an action.
    UnknownMethod = Unknown, "etcdserver: unknown method";
    /// grpc.health.v1 asked for an unknown service.
    UnknownHealthService = NotFound, "unknown service";
    /// A deposed leader refused to renew a lease.
    NotPrimaryLessor = Unknown, "not a primary lessor";
}

#[cfg(feature = "rpc")]
impl From<Error> for tonic::Status {
    fn from(error: Error) -> Self {
        tonic::Status::new(tonic::Code::from_i32(error.code() as i32), error.text())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_unique() {
        let mut texts: Vec<_> = Error::ALL.iter().map(|e| e.text()).collect();
        texts.sort_unstable();
        texts.dedup();
        assert_eq!(texts.len(), Error::ALL.len());
    }
}
