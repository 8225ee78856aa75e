//! Faults of the network: rules of the fabric. They are undone by `Fabric::heal`, all at once.

use std::time::Duration;

use super::{Fault, Hurt, Repeat, Scene};
use crate::fabric::{CONTROLLER, Fabric, Rule};
use crate::run::Run;

/// How long a flapping link stays as it is.
const FLAP: Duration = Duration::from_millis(700);

const DEAD: Rule = Rule {
    cut: true,
    loss: 0.0,
    duplicate: 0.0,
    delay: Duration::ZERO,
    jitter: Duration::ZERO,
    rate: None,
};

pub(super) fn install(fault: Fault, run: &Run, scene: &Scene) -> Hurt {
    let Scene { leader, members, others, follower, .. } = scene;
    let (leader, follower, fabric) = (*leader, *follower, &run.fabric);
    match fault {
        Fault::IsolateLeader => others.iter().for_each(|other| fabric.cut(leader, *other)),
        Fault::DeafLeader => others.iter().for_each(|other| fabric.set(*other, leader, DEAD)),
        Fault::MuteLeader => others.iter().for_each(|other| fabric.set(leader, *other, DEAD)),
        Fault::Ring => ring(fabric, scene),
        Fault::Bridge => bridge(fabric, scene),
        Fault::LeaderInMinority => {
            let with = ((members.len() - 1) / 2).saturating_sub(1);
            split(fabric, members, &[&[leader], &others[..with]].concat());
        }
        Fault::FollowersInMinority => split(fabric, members, &others[..(members.len() - 1) / 2]),
        Fault::AllApart => {
            pairs(members.len()).for_each(|(a, b)| fabric.cut(members[a], members[b]));
        }
        Fault::Loss => everywhere(fabric, members, Rule { loss: 0.1, ..Rule::default() }),
        Fault::Delay => everywhere(fabric, members, delayed(50, 10, 0.0)),
        Fault::Disorder => everywhere(fabric, members, delayed(0, 200, 0.05)),
        Fault::LeaderWithoutClients => fabric.cut(CONTROLLER, leader),
        Fault::ClientsOnlyLeader => {
            others.iter().for_each(|other| fabric.cut(CONTROLLER, *other));
        }
        Fault::AnswersLost => {
            members.iter().for_each(|member| fabric.set(*member, CONTROLLER, DEAD));
        }
        Fault::IsolateFollower => split(fabric, members, &[follower]),
        Fault::ThinFollower => {
            let thin = Rule { rate: Some(20_000), ..Rule::default() };
            for other in members.iter().filter(|member| **member != follower) {
                fabric.set(*other, follower, thin);
                fabric.set(follower, *other, thin);
            }
        }
        Fault::Flap => return flap(fabric.clone(), leader, others.clone()),
        other => unreachable!("{} is no fault of the network", other.name()),
    }
    Hurt::new(&[])
}

fn ring(fabric: &Fabric, scene: &Scene) {
    let members = &scene.members;
    let count = members.len();
    if count == 3 {
        return fabric.cut(scene.leader, scene.follower);
    }
    let apart = |(a, b): &(usize, usize)| b - a != 1 && b - a != count - 1;
    pairs(count).filter(apart).for_each(|(a, b)| fabric.cut(members[a], members[b]));
}

/// Of three members a chain with the follower in its middle, of more two halves that it joins.
fn bridge(fabric: &Fabric, scene: &Scene) {
    let rest: Vec<usize> =
        scene.members.iter().copied().filter(|member| *member != scene.follower).collect();
    let (one, other) = rest.split_at(rest.len() / 2);
    for a in one {
        other.iter().for_each(|b| fabric.cut(*a, *b));
    }
}

fn flap(fabric: Fabric, leader: usize, others: Vec<usize>) -> Hurt {
    let turn = move |on: bool| {
        let rule = if on { DEAD } else { Rule::default() };
        for other in &others {
            fabric.set(leader, *other, rule);
            fabric.set(*other, leader, rule);
        }
    };
    Hurt { repeat: Some(Repeat::start(FLAP, turn)), ..Hurt::new(&[]) }
}

fn delayed(delay: u64, jitter: u64, duplicate: f64) -> Rule {
    let (delay, jitter) = (Duration::from_millis(delay), Duration::from_millis(jitter));
    Rule { delay, jitter, duplicate, ..Rule::default() }
}

/// Cuts every link between some members and the rest.
fn split(fabric: &Fabric, members: &[usize], side: &[usize]) {
    for member in members.iter().filter(|member| !side.contains(member)) {
        side.iter().for_each(|away| fabric.cut(*member, *away));
    }
}

/// One rule on every link, those of the clients too.
fn everywhere(fabric: &Fabric, members: &[usize], rule: Rule) {
    let mut places = vec![CONTROLLER];
    places.extend(members);
    for from in &places {
        places.iter().filter(|to| *to != from).for_each(|to| fabric.set(*from, *to, rule));
    }
}

fn pairs(count: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..count).flat_map(move |a| (a + 1..count).map(move |b| (a, b)))
}
