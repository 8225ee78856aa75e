//! Feature gates: etcd's switches for behavior in the making. All of etcd's names are known, so
//! manifests parse; what a gate does here is said in its row and told once at the start.

use std::collections::BTreeMap;

use super::value::{Kind, Value};

/// How settled a feature is; `AllAlpha` and `AllBeta` switch whole stages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Off unless asked for.
    Alpha,
    /// On unless refused.
    Beta,
}

/// One gate and what asking for something else than its default means here.
pub(super) struct Gate {
    /// Name as etcd spells it.
    pub name: &'static str,
    /// Stage.
    pub stage: Stage,
    /// Whether it is on by default.
    pub default: bool,
    /// `None`: setting it has its effect. Otherwise why it has none.
    pub without_effect: Option<&'static str>,
}

const fn gate(
    name: &'static str,
    stage: Stage,
    default: bool,
    without_effect: Option<&'static str>,
) -> Gate {
    Gate { name, stage, default, without_effect }
}

/// All gates, in the order of etcd's list.
pub(super) const GATES: &[Gate] = &[
    gate(
        "StopGRPCServiceOnDefrag",
        Stage::Alpha,
        false,
        Some("defragmentation does not block requests here"),
    ),
    gate("InitialCorruptCheck", Stage::Alpha, false, None),
    gate("CompactHashCheck", Stage::Alpha, false, None),
    gate(
        "TxnModeWriteWithSharedBuffer",
        Stage::Beta,
        true,
        Some("transactions read from memory and have no write buffer to share"),
    ),
    gate("LeaseCheckpoint", Stage::Alpha, false, None),
    gate(
        "LeaseCheckpointPersist",
        Stage::Alpha,
        false,
        Some("remaining times of leases are always kept once they are checkpointed"),
    ),
    gate(
        "SetMemberLocalAddr",
        Stage::Alpha,
        false,
        Some("peer connections leave from the address that the system picks"),
    ),
    gate("FastLeaseKeepAlive", Stage::Beta, true, None),
    gate(
        "PriorityRequest",
        Stage::Alpha,
        false,
        Some("lease revocations and compactions always go first here"),
    ),
];

/// The gates that were set explicitly, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FeatureGates {
    set: BTreeMap<&'static str, bool>,
    all_alpha: Option<bool>,
    all_beta: Option<bool>,
}

impl FeatureGates {
    /// Sets one gate.
    ///
    /// # Errors
    /// `unrecognized feature gate: X` for a name etcd does not have.
    pub fn set(&mut self, name: &str, enabled: bool) -> Result<(), String> {
        match name {
            "AllAlpha" => self.all_alpha = Some(enabled),
            "AllBeta" => self.all_beta = Some(enabled),
            _ => {
                let gate = find(name).ok_or(format!("unrecognized feature gate: {name}"))?;
                self.set.insert(gate.name, enabled);
            }
        }
        Ok(())
    }

    /// Whether a gate was set by its own name.
    #[must_use]
    pub fn is_set(&self, name: &str) -> bool {
        self.set.contains_key(name)
    }

    /// Whether a gate is on: by its own setting, else by its stage's, else by default.
    #[must_use]
    pub fn enabled(&self, name: &str) -> bool {
        let Some(gate) = find(name) else { return false };
        let stage = match gate.stage {
            Stage::Alpha => self.all_alpha,
            Stage::Beta => self.all_beta,
        };
        self.set.get(gate.name).copied().or(stage).unwrap_or(gate.default)
    }

    /// Every gate with its stage (`ALPHA` or `BETA`) and whether it is on.
    pub fn all(&self) -> impl Iterator<Item = (&'static str, &'static str, bool)> {
        GATES.iter().map(|gate| {
            let stage = match gate.stage {
                Stage::Alpha => "ALPHA",
                Stage::Beta => "BETA",
            };
            (gate.name, stage, self.enabled(gate.name))
        })
    }

    /// Gates whose value differs from the default and that change nothing here, with the reason.
    pub fn without_effect(&self) -> impl Iterator<Item = (&'static str, &'static str)> {
        GATES.iter().filter_map(|gate| {
            let reason = gate.without_effect?;
            (self.enabled(gate.name) != gate.default).then_some((gate.name, reason))
        })
    }
}

impl Value for FeatureGates {
    const KIND: Kind = Kind::Text;

    fn parse(text: &str) -> Result<Self, String> {
        let mut gates = Self::default();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let (name, value) = part
                .split_once('=')
                .ok_or(format!("missing bool value for feature gate: {part}"))?;
            let (name, value) = (name.trim(), value.trim());
            let enabled = bool::parse(value)
                .map_err(|_| format!("invalid value of {name}={value}: not a bool"))?;
            gates.set(name, enabled)?;
        }
        Ok(gates)
    }

    fn show(&self) -> String {
        let stages = [("AllAlpha", self.all_alpha), ("AllBeta", self.all_beta)];
        let stages = stages.into_iter().filter_map(|(name, on)| Some((name, on?)));
        let all = stages.chain(self.set.iter().map(|(name, on)| (*name, *on)));
        all.map(|(name, on)| format!("{name}={on}")).collect::<Vec<_>>().join(",")
    }
}

fn find(name: &str) -> Option<&'static Gate> {
    GATES.iter().find(|gate| gate.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_setting_beats_the_stage_and_the_stage_beats_the_default() {
        let gates = FeatureGates::parse("AllAlpha=true,LeaseCheckpoint=false").expect("valid");
        assert!(gates.enabled("InitialCorruptCheck"));
        assert!(!gates.enabled("LeaseCheckpoint"));
        assert!(gates.enabled("FastLeaseKeepAlive"));
        assert_eq!(gates.show(), "AllAlpha=true,LeaseCheckpoint=false");
    }

    #[test]
    fn unknown_and_malformed_gates_are_refused() {
        assert_eq!(
            FeatureGates::parse("Nope=true"),
            Err("unrecognized feature gate: Nope".to_owned())
        );
        assert!(FeatureGates::parse("LeaseCheckpoint").is_err());
        assert!(FeatureGates::parse("LeaseCheckpoint=maybe").is_err());
        assert_eq!(FeatureGates::parse(""), Ok(FeatureGates::default()));
    }
}
