//! Rules of the Downgrade call. A member of this program runs at one cluster version only, so a
//! downgrade is validated as etcd does, but never begun.

use kelson_api::Error;
use kelson_api::etcdserverpb::downgrade_request::DowngradeAction;

use crate::housekeeping::version::Version;

/// Answers a downgrade request against the stored cluster version: the text for `version`.
///
/// # Errors
/// `UnknownMethod`, `DowngradeVersionFormat`, `ClusterVersionNotFound`, `DowngradeTarget`;
/// `NotCapable` for a valid downgrade that would have to be begun.
pub(super) fn answer(
    action: i32,
    target: &str,
    cluster_version: Option<&str>,
) -> Result<String, Error> {
    let current = || {
        let version = cluster_version.and_then(Version::parse);
        version.ok_or(Error::ClusterVersionNotFound)
    };
    match DowngradeAction::try_from(action).map_err(|_| Error::UnknownMethod)? {
        DowngradeAction::Validate => {
            validate(target, current)?;
            Ok(text(current()?))
        }
        DowngradeAction::Enable => {
            validate(target, current)?;
            Err(Error::NotCapable)
        }
        // Nothing to cancel is no error.
        DowngradeAction::Cancel => Ok(text(current()?)),
    }
}

fn validate(target: &str, current: impl Fn() -> Result<Version, Error>) -> Result<(), Error> {
    let target = Version::parse(target).ok_or(Error::DowngradeVersionFormat)?;
    let current = current()?;
    let allowed = Version { major: current.major, minor: current.minor.wrapping_sub(1) };
    if target == allowed { Ok(()) } else { Err(Error::DowngradeTarget) }
}

fn text(version: Version) -> String {
    format!("{}.{}", version.major, version.minor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_one_minor_below_is_valid() {
        let validate = |target| answer(0, target, Some("3.7.0"));
        assert_eq!(validate("3.6"), Ok("3.7".to_owned()));
        assert_eq!(validate("3.6.0"), Ok("3.7".to_owned()));
        assert_eq!(validate("3.5.0"), Err(Error::DowngradeTarget));
        assert_eq!(validate("3.7.0"), Err(Error::DowngradeTarget));
        assert_eq!(validate("2.6.0"), Err(Error::DowngradeTarget));
        assert_eq!(validate("three"), Err(Error::DowngradeVersionFormat));
        assert_eq!(validate(""), Err(Error::DowngradeVersionFormat));
        assert_eq!(answer(0, "bad", None), Err(Error::DowngradeVersionFormat));
        assert_eq!(answer(0, "3.6.0", None), Err(Error::ClusterVersionNotFound));
    }

    #[test]
    fn other_actions() {
        assert_eq!(answer(1, "3.5.0", Some("3.7.0")), Err(Error::DowngradeTarget));
        assert_eq!(answer(1, "3.6.0", Some("3.7.0")), Err(Error::NotCapable));
        assert_eq!(answer(2, "", Some("3.7.0")), Ok("3.7".to_owned()));
        assert_eq!(answer(9, "3.6.0", Some("3.7.0")), Err(Error::UnknownMethod));
    }
}
