//! How fast a server may be asked: requests and tokens a minute, pauses it asks for, and a circuit breaker.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use reqwest::header::HeaderMap;
use tokio::{sync::Notify, time::Instant};

/// A rate: so many units a minute, of which a few seconds' worth may come at once.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    per_minute: f64,
    level: f64,
    filled: Instant,
}

/// Seconds' worth of units that may come at once.
const BURST: f64 = 5.0;

impl Bucket {
    fn new(per_minute: f64) -> Self {
        Self { per_minute, level: capacity(per_minute), filled: Instant::now() }
    }

    fn fill(&mut self, now: Instant) {
        let gained = now.duration_since(self.filled).as_secs_f64() * self.per_minute / 60.0;
        self.level = (self.level + gained).min(capacity(self.per_minute));
        self.filled = now;
    }

    /// Time until `units` may be taken. More than the bucket holds waits for a full one.
    fn wait(&self, units: f64) -> Duration {
        let missing = units.min(capacity(self.per_minute)) - self.level;
        if missing <= 1e-9 { Duration::ZERO } else { Duration::from_secs_f64(missing * 60.0 / self.per_minute) }
    }
}

fn capacity(per_minute: f64) -> f64 {
    (per_minute * BURST / 60.0).max(1.0)
}

#[derive(Debug, Default)]
struct Rates {
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
    pause_until: Option<Instant>,
}

/// Rate limits of one server. Waiting requests are served in the order they came.
#[derive(Debug)]
pub(super) struct Limiter {
    rates: Mutex<Rates>,
    line: tokio::sync::Mutex<()>,
}

impl Limiter {
    pub(super) fn new(requests_per_minute: Option<u32>, tokens_per_minute: Option<u32>) -> Self {
        let bucket = |limit: Option<u32>| limit.map(|n| Bucket::new(f64::from(n)));
        let rates =
            Rates { requests: bucket(requests_per_minute), tokens: bucket(tokens_per_minute), pause_until: None };
        Self { rates: Mutex::new(rates), line: tokio::sync::Mutex::new(()) }
    }

    /// Waits until a request of about `tokens` may start.
    pub(super) async fn acquire(&self, tokens: u64) {
        if self.try_take(tokens).is_zero() {
            return;
        }
        let _turn = self.line.lock().await;
        loop {
            let wait = self.try_take(tokens);
            if wait.is_zero() {
                return;
            }
            tokio::time::sleep(wait).await;
        }
    }

    fn try_take(&self, tokens: u64) -> Duration {
        let mut rates = self.lock();
        let now = Instant::now();
        let pause = rates.pause_until.map_or(Duration::ZERO, |until| until.saturating_duration_since(now));
        let mut wait = pause;
        let amounts = [1.0, tokens as f64];
        let Rates { requests, tokens, .. } = &mut *rates;
        let mut buckets = [requests, tokens];
        for (bucket, amount) in buckets.iter_mut().zip(amounts) {
            if let Some(bucket) = bucket {
                bucket.fill(now);
                wait = wait.max(bucket.wait(amount));
            }
        }
        if wait.is_zero() {
            for (bucket, amount) in buckets.into_iter().zip(amounts) {
                if let Some(bucket) = bucket {
                    bucket.level -= amount;
                }
            }
        }
        wait
    }

    /// Nobody starts before `wait` has passed.
    pub(super) fn pause(&self, wait: Duration) {
        let until = Instant::now() + wait;
        let mut rates = self.lock();
        rates.pause_until = Some(rates.pause_until.map_or(until, |old| old.max(until)));
    }

    /// Takes over lower limits that the server names, and pauses where it says that nothing remains.
    pub(super) fn heed(&self, headers: &HeaderMap) {
        let number = |name: &str| headers.get(name)?.to_str().ok()?.trim().parse::<f64>().ok().filter(|n| *n >= 0.0);
        let mut pause = Duration::ZERO;
        let mut rates = self.lock();
        for what in ["requests", "tokens"] {
            let bucket = if what == "requests" { &mut rates.requests } else { &mut rates.tokens };
            if let Some(limit) = number(&format!("x-ratelimit-limit-{what}")).filter(|n| *n >= 1.0)
                && bucket.is_none_or(|b| limit < b.per_minute)
            {
                *bucket = Some(Bucket::new(limit));
            }
            if number(&format!("x-ratelimit-remaining-{what}")).is_some_and(|n| n < 1.0) {
                let reset = headers.get(format!("x-ratelimit-reset-{what}")).and_then(|v| v.to_str().ok());
                pause = pause.max(reset.and_then(go_duration).unwrap_or(Duration::from_secs(1)));
            }
        }
        drop(rates);
        if !pause.is_zero() {
            self.pause(pause.min(LONGEST_PAUSE));
        }
    }

    fn lock(&self) -> MutexGuard<'_, Rates> {
        self.rates.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Longest pause that a header may ask for.
pub(super) const LONGEST_PAUSE: Duration = Duration::from_secs(600);

/// How long the server wants to be left alone: `retry-after-ms`, or `retry-after` in seconds or as an HTTP date.
pub(super) fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = |name: &str| headers.get(name)?.to_str().ok().map(str::trim);
    let seconds = |s: f64| (s.is_finite() && s >= 0.0).then(|| Duration::from_secs_f64(s.min(86_400.0)));
    if let Some(wait) = text("retry-after-ms").and_then(|t| t.parse::<f64>().ok()).and_then(|ms| seconds(ms / 1e3)) {
        return Some(wait.min(LONGEST_PAUSE));
    }
    let value = text("retry-after")?;
    let wait = match value.parse::<f64>() {
        Ok(s) => seconds(s)?,
        Err(_) => httpdate::parse_http_date(value).ok()?.duration_since(now).unwrap_or_default(),
    };
    Some(wait.min(LONGEST_PAUSE))
}

/// A duration as these headers write it: `1s`, `6m0s`, `20ms`, `1h2m3.5s`, or plain seconds.
fn go_duration(text: &str) -> Option<Duration> {
    if let Ok(seconds) = text.trim().parse::<f64>() {
        return Duration::try_from_secs_f64(seconds).ok();
    }
    let mut rest = text.trim();
    let mut seconds = 0.0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..digits].parse().ok()?;
        let unit_end = rest[digits..].find(|c: char| c.is_ascii_digit()).map_or(rest.len(), |i| digits + i);
        seconds += number
            * match &rest[digits..unit_end] {
                "h" => 3600.0,
                "m" => 60.0,
                "s" => 1.0,
                "ms" => 1e-3,
                "us" | "µs" => 1e-6,
                _ => return None,
            };
        rest = &rest[unit_end..];
    }
    Duration::try_from_secs_f64(seconds).ok()
}

/// Stops asking a server that is down, and probes whether it is back.
#[derive(Debug)]
pub(super) struct Circuit {
    failures: u32,
    first_wait: Duration,
    probes: u32,
    state: Mutex<State>,
    change: Notify,
}

#[derive(Debug)]
struct State {
    in_a_row: u32,
    open: Option<Open>,
}

#[derive(Debug, Clone, Copy)]
struct Open {
    probe_at: Instant,
    wait: Duration,
    failed_probes: u32,
    probing: bool,
}

/// Leave to send a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pass {
    /// An ordinary request.
    Normal,
    /// The one request that finds out whether the server is back; its failure costs no attempt.
    Probe,
    /// The server stays down.
    Never,
}

impl Circuit {
    pub(super) fn new(failures: u32, first_wait: Duration, probes: u32) -> Self {
        let state = Mutex::new(State { in_a_row: 0, open: None });
        Self { failures, first_wait, probes, state, change: Notify::new() }
    }

    /// Waits until a request may be sent.
    pub(super) async fn admit(&self) -> Pass {
        loop {
            let change = self.change.notified();
            let wait = {
                let mut state = self.lock();
                let Some(open) = &mut state.open else { return Pass::Normal };
                let now = Instant::now();
                if open.failed_probes >= self.probes {
                    return Pass::Never;
                }
                if !open.probing && now >= open.probe_at {
                    open.probing = true;
                    return Pass::Probe;
                }
                if open.probing { None } else { Some(open.probe_at) }
            };
            match wait {
                Some(at) => tokio::select! { () = change => {}, () = tokio::time::sleep_until(at) => {} },
                None => change.await,
            }
        }
    }

    /// The server answered sensibly, be it with a refusal.
    pub(super) fn success(&self) {
        let mut state = self.lock();
        let was_open = state.open.take().is_some();
        state.in_a_row = 0;
        drop(state);
        if was_open {
            self.change.notify_waiters();
        }
    }

    /// The server failed; returns whether it now counts as down for good.
    pub(super) fn failure(&self, pass: Pass) -> bool {
        let mut state = self.lock();
        state.in_a_row += 1;
        let down = match &mut state.open {
            Some(open) if pass == Pass::Probe => {
                open.failed_probes += 1;
                open.wait = (open.wait * 2).min(LONGEST_PAUSE);
                (open.probe_at, open.probing) = (Instant::now() + open.wait, false);
                open.failed_probes >= self.probes
            }
            Some(_) => false,
            None => {
                if state.in_a_row >= self.failures {
                    let wait = self.first_wait;
                    state.open = Some(Open { probe_at: Instant::now() + wait, wait, failed_probes: 0, probing: false });
                }
                false
            }
        };
        drop(state);
        self.change.notify_waiters();
        down
    }

    /// A probe that was called off.
    pub(super) fn withdraw(&self, pass: Pass) {
        if pass == Pass::Probe {
            if let Some(open) = &mut self.lock().open {
                open.probing = false;
            }
            self.change.notify_waiters();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use reqwest::header::HeaderName;

    use super::*;

    fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
        pairs.iter().map(|(k, v)| (k.parse::<HeaderName>().unwrap(), v.parse().unwrap())).collect()
    }

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
    }

    #[test]
    fn a_server_says_in_four_ways_when_to_come_again() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let date = httpdate::fmt_http_date(now + Duration::from_secs(7));
        let past = httpdate::fmt_http_date(now - Duration::from_secs(7));
        for (pairs, want) in [
            (vec![("retry-after", "3")], Some(3.0)),
            (vec![("retry-after", " 0.25 ")], Some(0.25)),
            (vec![("retry-after", date.as_str())], Some(7.0)),
            (vec![("retry-after", past.as_str())], Some(0.0)),
            (vec![("retry-after-ms", "40"), ("retry-after", "9")], Some(0.04)),
            (vec![("retry-after", "999999")], Some(LONGEST_PAUSE.as_secs_f64())),
            (vec![("retry-after", "-1")], None),
            (vec![("retry-after", "soon")], None),
            (vec![], None),
        ] {
            assert_eq!(retry_after(&headers(&pairs), now).map(|d| d.as_secs_f64()), want, "{pairs:?}");
        }
        for (text, want) in [("6m0s", 360.0), ("20ms", 0.02), ("1h2m3.5s", 3723.5), ("17", 17.0)] {
            assert_eq!(go_duration(text).unwrap().as_secs_f64(), want, "{text}");
        }
        assert_eq!((go_duration("1y"), go_duration("s")), (None, None));
    }

    #[test]
    fn lower_limits_of_the_server_are_taken_over_and_nothing_left_means_a_pause() {
        runtime().block_on(async {
            let limiter = Limiter::new(Some(6000), None);
            limiter.heed(&headers(&[("x-ratelimit-limit-requests", "60"), ("x-ratelimit-remaining-requests", "9")]));
            assert_eq!(limiter.lock().requests.unwrap().per_minute, 60.0);
            limiter.heed(&headers(&[("x-ratelimit-limit-requests", "600")]));
            assert_eq!(limiter.lock().requests.unwrap().per_minute, 60.0, "never higher");
            assert!(limiter.try_take(1).is_zero());
            limiter.heed(&headers(&[("x-ratelimit-remaining-tokens", "0"), ("x-ratelimit-reset-tokens", "30s")]));
            assert!(limiter.try_take(1) > Duration::from_secs(29));
        });
    }

    #[test]
    fn tokens_count_as_well_as_requests() {
        runtime().block_on(async {
            // Five seconds' worth is 100 tokens.
            let limiter = Limiter::new(None, Some(1200));
            assert!(limiter.try_take(60).is_zero());
            let wait = limiter.try_take(60).as_secs_f64();
            assert!((0.9..=1.0).contains(&wait), "{wait}");
            assert!(limiter.try_take(40).is_zero(), "a smaller one fits");
            assert!(limiter.try_take(1_000_000) <= Duration::from_secs(5), "a large one waits for a full bucket");
        });
    }

    #[test]
    fn the_circuit_opens_is_probed_by_one_and_closes_or_stays_open() {
        runtime().block_on(async {
            let circuit = Circuit::new(2, Duration::from_millis(10), 2);
            assert_eq!(circuit.admit().await, Pass::Normal);
            circuit.failure(Pass::Normal);
            circuit.success();
            circuit.failure(Pass::Normal);
            assert_eq!(circuit.admit().await, Pass::Normal, "failures in a row count");
            circuit.failure(Pass::Normal);
            assert_eq!(circuit.admit().await, Pass::Probe);
            let second = tokio::time::timeout(Duration::from_millis(30), circuit.admit()).await;
            assert!(second.is_err(), "one probe at a time");
            circuit.success();
            assert_eq!(circuit.admit().await, Pass::Normal);
            circuit.failure(Pass::Normal);
            circuit.failure(Pass::Normal);
            for last in [false, true] {
                let pass = circuit.admit().await;
                assert_eq!((pass, circuit.failure(pass)), (Pass::Probe, last));
            }
            assert_eq!(circuit.admit().await, Pass::Never);
        });
    }
}
