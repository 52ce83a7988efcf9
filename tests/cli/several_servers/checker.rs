//! Whether a history of one action is linearizable: whether each attempt can have taken effect at one
//! moment between its being sent and its answer, so that the model gives every answer that was told.
//!
//! It is the search of Wing and Gong with the memory of Lowe. An attempt without an answer took effect
//! at some time after it was sent, or never. Time itself changes the model where an action expires or a
//! lease ends, which may be noticed later, but by the next request at the latest.

use std::collections::{BTreeMap, HashSet};
use std::fmt::Write as _;
use std::hash::{DefaultHasher, Hash, Hasher};

use super::history::{Asked, Attempt, State, Time, Told, ToldClaim};
use crate::support::reference::{Answer, Reference, Request};

/// The model's name of the one action.
pub const SLOT: usize = 0;

/// How far the clocks may be apart, in microseconds. They are one clock, which may be adjusted.
const SLACK: Time = 100_000;

/// The states that are looked at before the search is given up. A history of the load takes some hundreds.
const MOST: usize = 500_000;

/// A point of the search: the attempts that have taken effect, and what they lead to.
#[derive(Clone)]
struct Point {
    done: Vec<bool>,
    model: Reference,
    /// No attempt to come takes effect before this.
    now: Time,
    /// Whether the end of the live lease is known, and not only when it ends at the earliest.
    is_exact: bool,
}

struct Search<'a> {
    attempts: &'a [Attempt],
    seen: HashSet<u64>,
    /// The point that explains the most.
    best: Option<Point>,
}

/// Says what cannot be explained, if anything.
pub fn check(attempts: &[Attempt]) -> Result<(), String> {
    let mut search = Search {
        attempts,
        seen: HashSet::new(),
        best: None,
    };
    let begin = Point {
        done: vec![false; attempts.len()],
        model: Reference::default(),
        now: Time::MIN,
        is_exact: true,
    };
    if search.explains(begin) {
        Ok(())
    } else {
        Err(search.report())
    }
}

impl Point {
    /// What tells whether the model was changed.
    fn mark(&self) -> (usize, Option<Time>, bool) {
        let due = self.model.due_at(SLOT);
        (self.model.events.len(), due, self.is_exact)
    }

    fn count(&self) -> usize {
        self.done.iter().filter(|done| **done).count()
    }

    /// Lets an attempt take effect now. `None` if that would have been answered otherwise.
    fn after(&self, index: usize, attempt: &Attempt) -> Option<Self> {
        let mut next = self.clone();
        next.done[index] = true;
        next.now = self.now.max(attempt.sent);
        next.model.now = next.now;
        let told = attempt.told.as_ref();
        let Asked::Request(request) = &attempt.asked else {
            let shown = self.model.shown(SLOT).as_ref().map(State::of);
            let kinds: Vec<_> = self.model.events.iter().map(|event| event.kind).collect();
            let is_so = told.is_none_or(|(_, told)| {
                told.state == shown && told.kinds.as_ref().is_none_or(|told| *told == kinds)
            });
            return is_so.then_some(next);
        };
        // What is over is ended before a request is answered.
        let is_over = |due: Time| next.now > due + SLACK;
        if self.is_exact && self.model.due_at(SLOT).is_some_and(is_over) {
            return None;
        }
        let answer = next.model.apply(request);
        match told {
            Some((at, told)) => {
                let is_so = told.agrees(&answer) && next.takes(&answer, told, request, *at);
                is_so.then_some(next)
            }
            None => {
                if answer.claim.is_some() && answer.word != "replayed" {
                    next.is_exact = false;
                }
                Some(next)
            }
        }
    }

    /// Takes the end of a lease from an answer, if it can be that.
    fn takes(&mut self, answer: &Answer, told: &Told, request: &Request, at: Time) -> bool {
        let (Some(model), Some(ToldClaim { until, .. })) = (&answer.claim, told.claim) else {
            return true;
        };
        let is_possible = match (answer.word, request) {
            ("replayed", _) if self.is_exact => until.abs_diff(model.until) <= 1000,
            ("replayed", _) => until + SLACK >= model.until,
            (_, Request::Acquire { lease, .. } | Request::Renew { lease, .. }) => {
                until + SLACK >= model.until && until <= at + lease + SLACK
            }
            _ => false,
        };
        self.model.set_lease_end(SLOT, until);
        self.is_exact = true;
        is_possible
    }

    /// Lets time change the action.
    fn later(&self) -> Option<Self> {
        let due = self.model.due_at(SLOT)?;
        let mut next = self.clone();
        next.now = self.now.max(due - SLACK);
        next.model.now = next.now;
        next.model.settle(SLOT);
        Some(next)
    }
}

impl Search<'_> {
    /// When the first of the attempts that are left was answered.
    fn first_answer(&self, point: &Point) -> Option<Time> {
        let attempts = self.attempts.iter().zip(&point.done);
        let left = attempts.filter(|(_, done)| !**done);
        left.filter_map(|(attempt, _)| Some(attempt.told.as_ref()?.0))
            .min()
    }

    /// The attempts that may be the next to take effect. Of those of one call that nobody knows the
    /// outcome of, the first stands for all.
    fn next(&self, point: &Point) -> Vec<usize> {
        let Some(first) = self.first_answer(point) else {
            return Vec::new();
        };
        let left = (0..self.attempts.len()).filter(|index| !point.done[*index]);
        let may = left.filter(|index| self.attempts[*index].sent <= first);
        let (known, unknown): (Vec<_>, Vec<_>) =
            may.partition(|index| self.attempts[*index].told.is_some());
        let mut calls: BTreeMap<String, usize> = BTreeMap::new();
        for index in unknown {
            let call = self.attempts[index].asked.to_string();
            let of_call = calls.entry(call).or_insert(index);
            if self.attempts[index].sent < self.attempts[*of_call].sent {
                *of_call = index;
            }
        }
        known.into_iter().chain(calls.into_values()).collect()
    }

    /// Whether everything that is left can be explained.
    fn explains(&mut self, mut point: Point) -> bool {
        let first = self.first_answer(&point);
        if first.is_some_and(|first| first < point.now) {
            return false;
        }
        // What is answered so and changes nothing can as well take effect now. It is not later for that.
        let next = loop {
            let next = self.next(&point);
            let changes_nothing = next.iter().find(|index| {
                let attempt = &self.attempts[**index];
                let after = point.after(**index, attempt);
                attempt.told.is_some() && after.is_some_and(|after| after.mark() == point.mark())
            });
            match changes_nothing {
                Some(index) => point.done[*index] = true,
                None => break next,
            }
        };
        if next.is_empty() {
            return true;
        }
        let mut hasher = DefaultHasher::new();
        (&point.done, point.now, point.is_exact).hash(&mut hasher);
        point.model.hash_into(&mut hasher);
        if !self.seen.insert(hasher.finish()) {
            return false;
        }
        assert!(self.seen.len() < MOST, "too many ways: {}", self.report());
        if self
            .best
            .as_ref()
            .is_none_or(|best| best.count() < point.count())
        {
            self.best = Some(point.clone());
        }
        let (known, unknown): (Vec<_>, Vec<_>) = next
            .iter()
            .partition(|index| self.attempts[**index].told.is_some());
        let after = |index: usize| {
            let after = point.after(index, &self.attempts[index]);
            after.filter(|after| after.mark() != point.mark())
        };
        let known: Vec<_> = known.into_iter().filter_map(after).collect();
        let unknown: Vec<_> = unknown.into_iter().filter_map(after).collect();
        let all = known.into_iter().chain(point.later()).chain(unknown);
        let all: Vec<_> = all.collect();
        all.into_iter().any(|point| self.explains(point))
    }

    /// The history, and where it cannot be explained.
    fn report(&self) -> String {
        let mut text = String::new();
        let best = self.best.as_ref();
        let mut order: Vec<_> = (0..self.attempts.len()).collect();
        order.sort_by_key(|index| self.attempts[*index].sent);
        for index in order {
            let attempt = &self.attempts[index];
            let is_done = best.is_some_and(|best| best.done[index]);
            let mark = match (is_done, &attempt.told) {
                (true, _) => ' ',
                (false, Some(_)) => '!',
                (false, None) => '?',
            };
            let _ = writeln!(text, "{mark} {attempt}");
        }
        if let Some(best) = best {
            let kinds: Vec<_> = best
                .model
                .events
                .iter()
                .map(|event| event.kind.as_str())
                .collect();
            let _ = writeln!(text, "explained up to: {}", kinds.join(", "));
        }
        text
    }
}

#[cfg(test)]
mod tests;
