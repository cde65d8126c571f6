//! The rehearsal server as a program: it says where it listens, answers, counts, and ends with its counts.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    process::Stdio,
};

use serde_json::Value;

use super::{command, medtune};

/// Body of the answer to a request.
fn ask(address: &str, method: &str, path: &str, body: &str) -> Value {
    let mut stream = TcpStream::connect(address).unwrap();
    let length = body.len();
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {length}\r\n\r\n{body}"
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    serde_json::from_str(body).unwrap_or_else(|e| panic!("{e} in {answer}"))
}

#[test]
fn mock_llm_serves_until_it_is_interrupted() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("script.jsonl"), "{\"match\": \"nodule\", \"reply\": \"scripted\"}\n").unwrap();
    let args = ["mock-llm", "--port", "0", "--json", "--script", "script.jsonl", "--fault", "usage=1"];
    let mut child = command(dir.path(), &args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    out.read_line(&mut line).unwrap();
    let base_url = serde_json::from_str::<Value>(&line).unwrap()["base_url"].as_str().unwrap().to_string();
    let address = base_url.strip_prefix("http://").unwrap().strip_suffix("/v1").unwrap();
    assert!(address.starts_with("127.0.0.1:"), "{address}");
    for (text, scripted) in [("a nodule?", true), ("a cyst?", false)] {
        let body = serde_json::json!({ "model": "m", "messages": [{ "role": "user", "content": text }] });
        let reply = ask(address, "POST", "/v1/chat/completions", &body.to_string());
        assert_eq!(reply["choices"][0]["message"]["content"] == "scripted", scripted, "{reply}");
    }
    assert_eq!(ask(address, "GET", "/mock/stats", "")["paid"], 2);
    assert_eq!(ask(address, "GET", "/v1/models", "")["data"][0]["id"], "mock-general");
    std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    let mut rest = String::new();
    out.read_to_string(&mut rest).unwrap();
    assert!(child.wait().unwrap().success());
    let stats: Value = serde_json::from_str(&rest).unwrap();
    assert_eq!((&stats["requests"], &stats["paid"], &stats["paid_twice"]), (&2.into(), &2.into(), &0.into()));
}

#[test]
fn mock_llm_explains_what_it_does_not_know() {
    let dir = tempfile::tempdir().unwrap();
    medtune(dir.path(), &["mock-llm", "--fault", "421=1"]).code(2).blames(&["unknown fault", "429", "help: "]);
    medtune(dir.path(), &["mock-llm", "--fault", "429=2"]).code(2).blames(&["from 0 to 1"]);
    medtune(dir.path(), &["mock-llm", "--rules", "none"]).code(2).blames(&["unknown rules", "general"]);
    medtune(dir.path(), &["mock-llm", "--script", "absent"]).code(2).blames(&["absent"]);
}
