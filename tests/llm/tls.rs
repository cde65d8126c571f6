//! A server behind TLS: refused unless its certificate comes from a known authority. The authority, the certificate of
//! `localhost` and its key in `tests/llm/tls` were made for this test and are trusted by nobody else.

use std::{
    io::{Read, Write},
    net::TcpListener,
    path::PathBuf,
    sync::{Mutex, atomic::Ordering},
};

use medtune::{Kind, llm::Mode};
use rustls::{
    ServerConfig, ServerConnection,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};

use super::*;

fn file(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/llm/tls").join(name)
}

const KEY: &str = "sk-planted-tls";

/// A server for TLS that passes what it understands on to a rehearsal server.
struct Front {
    port: u16,
    stop: Arc<AtomicBool>,
    /// Decrypted bytes from clients.
    seen: Arc<Mutex<Vec<u8>>>,
}

impl Front {
    fn start(back: &MockServer) -> Self {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let chain = vec![CertificateDer::from_pem_file(file("server.pem")).unwrap()];
        let key = PrivateKeyDer::from_pem_file(file("server.key")).unwrap();
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .unwrap();
        let (config, listener) = (Arc::new(config), TcpListener::bind("127.0.0.1:0").unwrap());
        let port = listener.local_addr().unwrap().port();
        let (stop, seen) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let back = back.base_url().trim_start_matches("http://").trim_end_matches("/v1").to_string();
        let (ending, copies) = (Arc::clone(&stop), Arc::clone(&seen));
        std::thread::spawn(move || {
            for socket in listener.incoming() {
                if ending.load(Ordering::Relaxed) {
                    return;
                }
                let (config, back, copies) = (Arc::clone(&config), back.clone(), Arc::clone(&copies));
                // A client that refuses the certificate ends the connection, which is no news here.
                std::thread::spawn(move || socket.and_then(|socket| exchange(socket, config, &back, &copies)));
            }
        });
        Self { port, stop, seen }
    }

    fn url(&self, host: &str) -> String {
        format!("https://{host}:{}/v1", self.port)
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = std::net::TcpStream::connect(("127.0.0.1", self.port));
    }
}

/// Shakes hands, reads a request, asks the server behind, and passes its answer back.
fn exchange(
    mut socket: std::net::TcpStream,
    config: Arc<ServerConfig>,
    back: &str,
    copies: &Mutex<Vec<u8>>,
) -> std::io::Result<()> {
    let mut connection = ServerConnection::new(config).map_err(std::io::Error::other)?;
    let mut tls = rustls::Stream::new(&mut connection, &mut socket);
    let request = message(&mut tls)?;
    copies.lock().unwrap().extend(&request);
    let mut behind = std::net::TcpStream::connect(back)?;
    behind.write_all(&request)?;
    tls.write_all(&closing(message(&mut behind)?))?;
    tls.conn.send_close_notify();
    tls.flush()
}

/// Reads one HTTP message with a `content-length`.
fn message(from: &mut impl Read) -> std::io::Result<Vec<u8>> {
    let (mut bytes, mut part) = (Vec::new(), [0; 4096]);
    loop {
        let head = bytes.windows(4).position(|w| w == b"\r\n\r\n");
        if let Some(head) = head {
            let text = String::from_utf8_lossy(&bytes[..head]).to_lowercase();
            let length = text.lines().find_map(|l| l.strip_prefix("content-length:")).unwrap_or("0");
            if bytes.len() >= head + 4 + length.trim().parse::<usize>().unwrap() {
                return Ok(bytes);
            }
        }
        match from.read(&mut part)? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            n => bytes.extend(&part[..n]),
        }
    }
}

/// An answer after which the connection is closed.
fn closing(answer: Vec<u8>) -> Vec<u8> {
    let line = answer.windows(2).position(|w| w == b"\r\n").unwrap() + 2;
    [&answer[..line], b"connection: close\r\n", &answer[line..]].concat()
}

fn trusting(front: &Front, host: &str, ca: Option<PathBuf>) -> LlmConfig {
    let mut config = config(&front.url(host));
    config.generate.ca_file = ca;
    config
}

#[test]
fn an_unknown_authority_is_refused_before_anything_is_sent() {
    let server = server(|_| {});
    let front = Front::start(&server);
    for mode in [Mode::Online, Mode::Batch] {
        let dir = tempfile::tempdir().unwrap();
        let config = LlmConfig { mode, ..trusting(&front, "localhost", None) };
        let error = job(&open_with(&config, dir.path(), &[("OPENAI_API_KEY", KEY)]), 3).err().unwrap();
        assert!(error.to_string().contains("certificate") && error.to_string().contains("not trusted"), "{error}");
        assert!(error.help_line().unwrap().contains("ca_file"), "{error:?}");
    }
    assert_eq!((server.stats().requests, front.seen.lock().unwrap().len()), (0, 0));
}

#[test]
fn an_authority_of_ones_own_is_trusted() {
    let server = server(|c| c.key = Some(KEY.into()));
    let front = Front::start(&server);
    for host in ["localhost", "127.0.0.1"] {
        let dir = tempfile::tempdir().unwrap();
        let config = trusting(&front, host, Some(file("ca.pem")));
        let client = open_with(&config, dir.path(), &[("OPENAI_API_KEY", KEY)]);
        assert_eq!(job(&client, 20).unwrap().rows, truth(20), "{host}");
    }
    assert!(String::from_utf8_lossy(&front.seen.lock().unwrap()).contains(KEY), "the key went through TLS");
}

#[test]
fn a_file_that_holds_no_authority_is_an_error_before_the_run() {
    let (dir, server) = (tempfile::tempdir().unwrap(), server(|_| {}));
    let front = Front::start(&server);
    let empty = dir.path().join("empty.pem");
    std::fs::write(&empty, "nothing\n").unwrap();
    for bad in [dir.path().join("absent.pem"), empty, file("server.key")] {
        let config = trusting(&front, "localhost", Some(bad.clone()));
        let error = Client::open_with(&config, options(dir.path()), &|_| None).unwrap_err();
        assert!(error.kind() == Kind::Config && error.to_string().contains(bad.to_str().unwrap()), "{error}");
    }
}
