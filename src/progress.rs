//! Progress of a stage: a bar with ETA on a terminal, plain lines otherwise, nothing with `--quiet`.
//! The only module that writes to stderr while work is going on.

use std::{
    io::IsTerminal,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

/// How progress is shown.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Progress {
    /// A bar that redraws itself.
    Bar,
    /// One line every few seconds.
    Lines,
    /// Nothing.
    #[default]
    Silent,
}

impl Progress {
    /// A bar on a terminal, lines elsewhere.
    #[must_use]
    pub fn detect() -> Self {
        if std::io::stderr().is_terminal() { Self::Bar } else { Self::Lines }
    }

    /// Starts a task of `total` units, 0 where nobody knows; `what` is a verb phrase such as `encode rows`.
    #[must_use]
    pub fn start(self, what: &str, total: u64) -> Task {
        let bar = match self {
            Self::Bar => {
                let template = match total {
                    0 => "{prefix:<18} {spinner} {pos} {per_sec} {msg}",
                    _ => "{prefix:<18} {wide_bar} {pos}/{len} {per_sec} eta {eta} {msg}",
                };
                let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
                ProgressBar::new(total).with_style(style).with_prefix(what.to_string())
            }
            Self::Lines | Self::Silent => ProgressBar::hidden(),
        };
        Task {
            mode: self,
            bar,
            what: what.to_string(),
            total,
            done: 0,
            started: Instant::now(),
            said: Instant::now(),
            message: String::new(),
        }
    }

    /// Says one line about what happens.
    pub fn say(self, line: &str) {
        if self != Self::Silent {
            eprintln!("{line}");
        }
    }
}

/// A running task; ends when dropped or [`Task::finish`]ed.
#[derive(Debug)]
pub struct Task {
    mode: Progress,
    bar: ProgressBar,
    what: String,
    total: u64,
    done: u64,
    started: Instant,
    said: Instant,
    message: String,
}

impl Task {
    /// `n` more units are done.
    pub fn advance(&mut self, n: u64) {
        self.done += n;
        self.bar.inc(n);
        if self.mode == Progress::Lines && self.said.elapsed() >= Duration::from_secs(10) {
            self.said = Instant::now();
            self.line();
        }
    }

    /// Short text beside the bar, for example the current loss.
    pub fn message(&mut self, message: impl Into<String>) {
        self.message = message.into();
        self.bar.set_message(self.message.clone());
    }

    /// Ends the task and, without a terminal, says how long it took.
    pub fn finish(self) {
        self.bar.finish_and_clear();
        if self.mode == Progress::Lines {
            self.line();
        }
    }

    fn line(&self) {
        let seconds = self.started.elapsed().as_secs_f64();
        let (what, done, total) = (&self.what, self.done, self.total);
        if total == 0 {
            eprintln!("{what}: {done} in {seconds:.0} s {}", self.message);
            return;
        }
        let left = if done > 0 { seconds / done as f64 * total.saturating_sub(done) as f64 } else { 0.0 };
        eprintln!("{what}: {done}/{total} in {seconds:.0} s, {left:.0} s left {}", self.message);
    }
}
