//! Money and requests: hard limits, reservations, and the estimate of a dry run.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{
    config::{LlmConfig, Mode, Price},
    ledger::Totals,
    reply::Usage,
    request::Request,
    wire::{Prepared, TokenBounds},
};
use crate::error::{Error, Kind, Result};

/// Cost of tokens in US dollars.
pub(super) fn cost(price: Option<Price>, config: &LlmConfig, prompt: u64, completion: u64) -> f64 {
    let factor = if config.mode == Mode::Batch { config.batch.price_factor } else { 1.0 };
    price.map_or(0.0, |p| factor * (prompt as f64 * p.prompt + completion as f64 * p.completion) / 1e6)
}

/// What a request may cost: its tokens, and the most in US dollars.
///
/// # Errors
/// Money is limited and the model has no price.
pub(super) fn worst_case(prepared: &Prepared, config: &LlmConfig) -> Result<(TokenBounds, f64)> {
    let price = config.prices.get(&prepared.model).copied();
    if config.max_usd.is_some() && price.is_none() {
        return Err(Error::new(Kind::Config, "no price for a model, so llm.max_usd cannot be kept")
            .found(&prepared.model)
            .help(format!(
                "add [llm.prices.{:?}] with prompt and completion, in US dollars a million tokens",
                prepared.model
            )));
    }
    let bounds = prepared.tokens(price.map_or_else(super::config::image_tokens, |p| p.image_tokens));
    Ok((bounds, cost(price, config, bounds.most_prompt, bounds.most_completion)))
}

/// What may still be spent.
#[derive(Debug)]
pub(super) struct Budget {
    max_usd: Option<f64>,
    max_requests: Option<u64>,
    /// Paid, or perhaps paid.
    spent: f64,
    requests: u64,
    reserved: f64,
    under_way: u64,
    exhausted: Option<&'static str>,
}

/// Whether a request may start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Admission {
    Granted,
    /// What is under way decides.
    Wait,
    /// Never again; the limit that says so.
    Refused(&'static str),
}

/// Cents are not worth stopping for: sums of many small costs are off by rounding.
const ROUNDING: f64 = 1e-9;

impl Budget {
    pub(super) fn new(config: &LlmConfig, so_far: &Totals) -> Self {
        Self {
            max_usd: config.max_usd,
            max_requests: config.max_requests,
            spent: so_far.usd + so_far.usd_in_doubt,
            requests: so_far.replies + so_far.in_doubt,
            reserved: 0.0,
            under_way: 0,
            exhausted: None,
        }
    }

    /// Asks for leave to start a request that costs at most `most`; if granted, that is set aside. The first refusal is
    /// final, so that what is paid for is a prefix of the rows, whatever the order of replies.
    pub(super) fn admit(&mut self, most: f64) -> Admission {
        if let Some(limit) = self.exhausted {
            return Admission::Refused(limit);
        }
        let money = self.max_usd.is_some_and(|max| self.spent + self.reserved + most > max + ROUNDING);
        let count = self.max_requests.is_some_and(|max| self.requests + self.under_way >= max);
        match (money || count, self.under_way) {
            (false, _) => {
                self.reserved += most;
                self.under_way += 1;
                Admission::Granted
            }
            (true, 0) => {
                let limit = if money { "max_usd" } else { "max_requests" };
                self.exhausted = Some(limit);
                Admission::Refused(limit)
            }
            (true, _) => Admission::Wait,
        }
    }

    /// Ends a reservation: `paid` is what it cost, none if it certainly cost nothing.
    pub(super) fn settle(&mut self, reserved: f64, paid: Option<f64>) {
        self.reserved -= reserved;
        self.under_way -= 1;
        if let Some(usd) = paid {
            self.spent += usd;
            self.requests += 1;
        }
    }

    /// Whether an attempt of unknown fate may be followed by another, now that both count.
    pub(super) fn repeat(&mut self, most: f64) -> bool {
        let money = self.max_usd.is_some_and(|max| self.spent + self.reserved + most > max + ROUNDING);
        let count = self.max_requests.is_some_and(|max| self.requests + self.under_way >= max);
        if !money && !count {
            self.spent += most;
            self.requests += 1;
        }
        !money && !count
    }
}

/// What requests would take, and the first of them.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Estimate {
    /// Requests that would be sent.
    pub requests: u64,
    /// Requests whose reply is there already.
    pub cached: u64,
    /// Images in them.
    pub images: u64,
    /// Tokens of the prompts, at four bytes a token.
    pub prompt_tokens: u64,
    /// Tokens of the replies if each is as long as allowed.
    pub completion_tokens: u64,
    /// Their cost in US dollars.
    pub usd: f64,
    /// Requests by model; a model without a price costs nothing above.
    pub models: BTreeMap<String, ModelEstimate>,
    /// The first requests, as they would be sent.
    pub examples: Vec<Request>,
}

/// The share of one model in an [`Estimate`].
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct ModelEstimate {
    /// Requests.
    pub requests: u64,
    /// Cost in US dollars; none without a price.
    pub usd: Option<f64>,
}

/// Requests that an estimate shows.
const EXAMPLES: usize = 3;

impl Estimate {
    pub(super) fn add(&mut self, prepared: &Prepared, config: &LlmConfig) {
        let price = config.prices.get(&prepared.model).copied();
        let bounds = prepared.tokens(price.map_or_else(super::config::image_tokens, |p| p.image_tokens));
        let usd = cost(price, config, bounds.likely_prompt, bounds.most_completion);
        self.requests += 1;
        self.images += prepared.request.images() as u64;
        self.prompt_tokens += bounds.likely_prompt;
        self.completion_tokens += bounds.most_completion;
        self.usd += usd;
        let model = self.models.entry(prepared.model.clone()).or_default();
        model.requests += 1;
        model.usd = price.map(|_| model.usd.unwrap_or_default() + usd);
        if self.examples.len() < EXAMPLES {
            self.examples.push(prepared.request.clone());
        }
    }
}

/// Cost of a reply.
pub(super) fn paid(config: &LlmConfig, model: &str, usage: Usage) -> f64 {
    cost(config.prices.get(model).copied(), config, usage.prompt_tokens, usage.completion_tokens)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn budget(max_usd: Option<f64>, max_requests: Option<u64>) -> Budget {
        let config = LlmConfig { max_usd, max_requests, ..LlmConfig::default() };
        Budget::new(&config, &Totals { usd: 1.0, replies: 2, in_doubt: 1, usd_in_doubt: 0.5, ..Totals::default() })
    }

    #[test]
    fn a_started_request_counts_with_its_worst_case_until_it_is_settled() {
        let mut b = budget(Some(2.0), None);
        assert_eq!(b.admit(0.3), Admission::Granted);
        assert_eq!(b.admit(0.3), Admission::Wait, "1.5 spent, 0.3 set aside");
        b.settle(0.3, Some(0.1));
        assert_eq!(b.admit(0.3), Admission::Granted);
        b.settle(0.3, None);
        assert_eq!(b.admit(0.41), Admission::Refused("max_usd"));
        assert_eq!(b.admit(0.0), Admission::Refused("max_usd"), "the first refusal is final");
    }

    #[test]
    fn failures_do_not_count_as_requests_and_doubtful_ones_do() {
        let mut b = budget(None, Some(4));
        assert_eq!(b.admit(0.0), Admission::Granted);
        assert_eq!(b.admit(0.0), Admission::Wait);
        b.settle(0.0, None);
        assert_eq!(b.admit(0.0), Admission::Granted);
        assert!(!b.repeat(0.0), "the attempt in doubt is the fourth");
        b.settle(0.0, Some(0.0));
        assert_eq!(b.admit(0.0), Admission::Refused("max_requests"));
    }
}
