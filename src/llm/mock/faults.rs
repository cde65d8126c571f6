//! The ways in which the rehearsal server fails when asked to.

use std::{collections::BTreeMap, time::Duration};

use rand::RngExt;

use crate::{
    error::{Error, Kind, Result},
    random::stream,
};

/// A way to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fault {
    /// 429 with `Retry-After`; unpaid.
    RateLimit,
    /// 500; unpaid.
    ServerError,
    /// The answer comes late; paid, unless the client hangs up before.
    Slow,
    /// The connection closes before any answer; unpaid.
    Drop,
    /// The connection closes in the middle of the answer; paid.
    Cut,
    /// 200 with a page of HTML, as a proxy in between sends it; unpaid.
    NotJson,
    /// 400 from a content filter; unpaid.
    Filter,
    /// The text of the reply ends in the middle, `finish_reason` is `length`; paid.
    Truncated,
    /// A reply of another shape than the schema; paid.
    WrongSchema,
    /// The model declines; paid.
    Refusal,
    /// The reply claims an impossible number of tokens, or none; paid.
    Usage,
    /// An empty reply with `finish_reason` `content_filter`; paid.
    Empty,
    /// `response_format` of type `json_schema` is rejected with 400; unpaid.
    NoJsonSchema,
    /// A batch expires before its second half is done.
    Expire,
}

impl Fault {
    /// All of them.
    pub const ALL: [Self; 14] = [
        Self::RateLimit,
        Self::ServerError,
        Self::Slow,
        Self::Drop,
        Self::Cut,
        Self::NotJson,
        Self::Filter,
        Self::Truncated,
        Self::WrongSchema,
        Self::Refusal,
        Self::Usage,
        Self::Empty,
        Self::NoJsonSchema,
        Self::Expire,
    ];

    /// Name on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::RateLimit => "429",
            Self::ServerError => "500",
            Self::Slow => "slow",
            Self::Drop => "drop",
            Self::Cut => "cut",
            Self::NotJson => "not-json",
            Self::Filter => "filter",
            Self::Truncated => "truncated",
            Self::WrongSchema => "wrong-schema",
            Self::Refusal => "refusal",
            Self::Usage => "usage",
            Self::Empty => "empty",
            Self::NoJsonSchema => "no-json-schema",
            Self::Expire => "expire",
        }
    }

    /// The fault of this name.
    ///
    /// # Errors
    /// There is none.
    pub fn parse(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|f| f.name() == name).ok_or_else(|| {
            Error::new(Kind::Config, "unknown fault")
                .expected(Self::ALL.map(Self::name).join(", "))
                .found(name)
                .help("for example --fault 429=0.05")
        })
    }

    /// Whether it spoils an answer that is paid for, rather than the way to it.
    pub(super) fn is_flaw(self) -> bool {
        matches!(self, Self::Cut | Self::Truncated | Self::WrongSchema | Self::Refusal | Self::Usage | Self::Empty)
    }
}

/// How often each fault happens.
#[derive(Debug, Clone, PartialEq)]
pub struct Faults {
    /// Share of requests, 0 to 1.
    pub rates: BTreeMap<Fault, f64>,
    /// Most times in a row that one request fails.
    pub repeats: u32,
    /// `Retry-After` of a 429.
    pub retry_after: Duration,
    /// Delay of a slow answer.
    pub slow: Duration,
}

impl Default for Faults {
    fn default() -> Self {
        Self { rates: BTreeMap::new(), repeats: 2, retry_after: Duration::from_secs(1), slow: Duration::from_secs(5) }
    }
}

impl Faults {
    /// Adds `NAME=RATE`.
    ///
    /// # Errors
    /// There is no such fault, or the rate is not from 0 to 1.
    pub fn add(&mut self, text: &str) -> Result<()> {
        let (name, rate) = text.split_once('=').unwrap_or((text, "1"));
        let rate = rate.parse::<f64>().ok().filter(|r| (0.0..=1.0).contains(r)).ok_or_else(|| {
            Error::new(Kind::Config, "a rate of faults is not one")
                .expected("a share from 0 to 1")
                .found(rate)
                .help("for example --fault 429=0.05")
        })?;
        self.rates.insert(Fault::parse(name.trim())?, rate);
        Ok(())
    }

    /// Whether a batch expires.
    pub(super) fn draw_batch(&self, seed: u64, batch: u64) -> bool {
        stream(seed, "mock/expire", batch).random_bool(self.rate(Fault::Expire))
    }

    pub(super) fn rate(&self, fault: Fault) -> f64 {
        self.rates.get(&fault).copied().unwrap_or_default()
    }

    /// What happens to a request at its `arrival`-th coming, from 0. The same for the same seed and request.
    pub(super) fn draw(&self, seed: u64, request: u128, arrival: u32) -> Option<Fault> {
        if self.rates.is_empty() || arrival >= self.repeats {
            return None;
        }
        let mut draws = stream(seed, &format!("mock/fault/{arrival}"), request as u64);
        let always = [Fault::NoJsonSchema, Fault::Expire];
        let mut left = 1.0;
        for (fault, rate) in self.rates.iter().filter(|(f, _)| !always.contains(f)) {
            if draws.random_range(0.0..left) < *rate {
                return Some(*fault);
            }
            // Rates are shares of all requests, not of those that the faults before spared.
            left = f64::max(left - rate, f64::MIN_POSITIVE);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_shares_of_all_requests() {
        let mut faults = Faults::default();
        for text in ["429=0.3", "500=0.2", "refusal=0.5"] {
            faults.add(text).unwrap();
        }
        let mut counts = BTreeMap::new();
        for request in 0..4000u128 {
            *counts.entry(faults.draw(1, request, 0)).or_insert(0) += 1;
            assert_eq!(faults.draw(1, request, 2), None, "repeats end");
        }
        for (fault, want) in [(Fault::RateLimit, 1200), (Fault::ServerError, 800), (Fault::Refusal, 2000)] {
            let found: i32 = counts.get(&Some(fault)).copied().unwrap_or(0);
            assert!((found - want).abs() < 150i32, "{fault:?}: {found} of {want}");
        }
        assert_eq!(counts.get(&None), None);
        assert!(faults.add("429=1.5").is_err() && faults.add("421").is_err());
    }
}
