//! The rehearsal server as a verb.

use std::{
    sync::{Arc, atomic::AtomicBool, atomic::Ordering},
    time::Duration,
};

use serde_json::json;

use super::{columns, emit, print};
use crate::{
    cli::{Global, MockArgs},
    error::{Error, Kind, Result},
    llm::mock::{Faults, MockConfig, MockServer, Stats},
};

/// Serves until the user interrupts.
pub(super) fn serve(global: &Global, args: &MockArgs) -> Result<()> {
    let stop = Arc::new(AtomicBool::new(false));
    crate::run::stop_on_signals(&stop)?;
    let server = MockServer::start(config(args)?)?;
    let base_url = server.base_url();
    // Whoever starts this program waits for this line.
    match global.json {
        true => print(&json!({ "base_url": base_url }).to_string())?,
        false => print(&format!("listening: OPENAI_BASE_URL={base_url}"))?,
    }
    if !args.host.is_loopback() && !global.quiet {
        eprintln!("warning: other machines can reach this server");
    }
    while !stop.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(50));
    }
    let stats = server.stats();
    emit(global, &stats, || text(&stats))
}

fn config(args: &MockArgs) -> Result<MockConfig> {
    let mut faults = Faults {
        repeats: args.fault_repeats,
        retry_after: Duration::try_from_secs_f64(args.retry_after).map_err(|e| {
            Error::new(Kind::Config, "cannot wait that long").at("--retry-after").found(args.retry_after).source(e)
        })?,
        slow: Duration::from_millis(args.slow_ms),
        ..Faults::default()
    };
    args.fault.iter().try_for_each(|f| faults.add(f))?;
    let key = args.key_env.as_ref().map(|name| {
        std::env::var(name)
            .map_err(|_| Error::new(Kind::Config, "an environment variable is not set").at("--key-env").found(name))
    });
    Ok(MockConfig {
        host: args.host,
        port: args.port,
        script: args.script.clone(),
        faults,
        latency: Duration::from_millis(args.latency_ms),
        reply_bytes: args.reply_bytes,
        idempotent: !args.forgetful,
        key: key.transpose()?,
        ..MockConfig::rehearsal(&args.rules, args.seed)?
    })
}

fn text(stats: &Stats) -> String {
    let mut rows = vec![
        vec!["requests".to_string(), stats.requests.to_string()],
        vec!["paid".into(), stats.paid.to_string()],
        vec!["paid twice".into(), stats.paid_twice.to_string()],
        vec!["known answers given again".into(), stats.replayed.to_string()],
        vec!["most under way".into(), stats.most_under_way.to_string()],
        vec!["batches".into(), stats.batches.to_string()],
    ];
    rows.extend(stats.faults.iter().map(|(name, count)| vec![format!("  {name}"), count.to_string()]));
    columns(&rows)
}
