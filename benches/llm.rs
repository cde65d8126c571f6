//! End-to-end throughput of the language-model client against `medtune mock-llm`, ledger on.
//!
//! ```sh
//! medtune mock-llm --port 8080 --reply-bytes 1024 &
//! cargo bench --bench llm -- http://127.0.0.1:8080/v1 20000 512
//! python benches/peers/asyncio_client.py http://127.0.0.1:8080/v1 20000 512
//! ```
//!
//! Prints requests per second of a first run and of a second one that is answered from the ledger, and the peak memory.

#![expect(clippy::print_stdout, reason = "a benchmark says what it measured")]

use std::{sync::Arc, time::Instant};

use medtune::llm::{Client, ClientOptions, EndpointRole, LlmConfig, Message, Request, Sampling, Speaker};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn request(row: usize) -> Request {
    let text = format!("Row {row}. {}", "Is there a nodule in the left lung? ".repeat(14));
    let sampling = Sampling { max_tokens: 300, ..Sampling::default() };
    Request { sampling, ..Request::new(EndpointRole::Generate, vec![Message::text(Speaker::User, text)]) }
}

fn main() {
    let numbers: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let [base_url, count, in_flight] = numbers.as_slice() else {
        println!("usage: BASE_URL REQUESTS IN_FLIGHT");
        return;
    };
    let (count, in_flight): (usize, usize) = (count.parse().unwrap(), in_flight.parse().unwrap());
    let dir = tempfile::tempdir().unwrap();
    let mut config = LlmConfig { concurrency: in_flight, ..LlmConfig::default() };
    config.generate.base_url = Some(base_url.clone());
    config.generate.model = Some("mock".into());
    for pass in ["sent", "from the ledger"] {
        let started = Instant::now();
        let options = ClientOptions::new(dir.path().join("ledger.sqlite"), 1, &Arc::default());
        let client = Client::open(&config, options).unwrap();
        let mut bytes = 0;
        client
            .run((0..count).map(|row| Ok((row, request(row)))), |_, reply| {
                bytes += reply.unwrap().text.len();
                Ok(())
            })
            .unwrap();
        let seconds = started.elapsed().as_secs_f64();
        let rate = count as f64 / seconds;
        println!(
            "medtune: {count} requests {pass}, {in_flight} in flight, {seconds:.2} s, {rate:.0}/s, \
             {} bytes a reply, {} MiB",
            bytes / count,
            peak_mib()
        );
    }
}

/// Peak resident memory of this process.
fn peak_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or_default() / 1024
}
