//! Learning rate of each optimizer step, step by step as in Hugging Face's schedulers: with any warm-up, the first step
//! has learning rate 0.

use super::config::SchedulerType;

/// A schedule over a known number of steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Schedule {
    /// Shape after the warm-up.
    pub kind: SchedulerType,
    /// Steps of the warm-up.
    pub warmup: usize,
    /// All steps.
    pub total: usize,
}

impl Schedule {
    /// Factor on every group's peak learning rate at step `step`, counted from 0.
    #[must_use]
    pub fn factor(&self, step: usize) -> f64 {
        if step < self.warmup {
            return step as f64 / self.warmup.max(1) as f64;
        }
        let rest = self.total.saturating_sub(self.warmup).max(1) as f64;
        match self.kind {
            SchedulerType::Constant => 1.0,
            SchedulerType::Linear => (self.total as f64 - step as f64).max(0.0) / rest,
            SchedulerType::Cosine => {
                let progress = (step - self.warmup) as f64 / rest;
                (0.5 * (1.0 + (std::f64::consts::PI * progress).cos())).max(0.0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warm_up_starts_at_zero_and_the_end_is_near_zero() {
        for kind in [SchedulerType::Linear, SchedulerType::Cosine] {
            let s = Schedule { kind, warmup: 2, total: 10 };
            assert_eq!([s.factor(0), s.factor(1), s.factor(2)], [0.0, 0.5, 1.0]);
            assert!(s.factor(9) > 0.0 && s.factor(9) < 0.2, "{}", s.factor(9));
            assert!(s.factor(10).abs() < 1e-12);
        }
        let linear = Schedule { kind: SchedulerType::Linear, warmup: 2, total: 10 };
        assert_eq!(linear.factor(6), 0.5);
        let constant = Schedule { kind: SchedulerType::Constant, warmup: 0, total: 10 };
        assert_eq!([constant.factor(0), constant.factor(100)], [1.0, 1.0]);
    }

    #[test]
    fn cosine_halves_in_the_middle() {
        let s = Schedule { kind: SchedulerType::Cosine, warmup: 4, total: 24 };
        assert!((s.factor(14) - 0.5).abs() < 1e-12);
    }
}
