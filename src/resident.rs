//! Memory of this process and this machine, as the operating system counts it.

/// Bytes of a `Name:   123 kB` line in a file of /proc; none where there is no such file or line.
fn line(file: &str, name: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib * 1024)
}

/// Largest resident memory of this process so far, pages of mapped files included; none where the system does not say.
#[must_use]
pub fn peak_bytes() -> Option<u64> {
    line("/proc/self/status", "VmHWM")
}

/// Resident memory of this process that belongs to no file.
#[must_use]
pub fn anonymous_bytes() -> Option<u64> {
    line("/proc/self/status", "RssAnon")
}

/// Memory that programs can still take on this machine without swapping.
#[must_use]
pub fn available_bytes() -> Option<u64> {
    line("/proc/meminfo", "MemAvailable")
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn memory_that_is_touched_is_counted() {
        let (before, peak) = (anonymous_bytes().unwrap(), peak_bytes().unwrap());
        let block = vec![1u8; 64 << 20];
        let after = anonymous_bytes().unwrap();
        assert!(after >= before + (48 << 20) || after >= 64 << 20, "{before} {after}");
        assert!(peak_bytes().unwrap() >= peak.max(after.min(64 << 20)));
        assert!(available_bytes().unwrap() > 0 && block[1 << 20] == 1);
        assert_eq!(line("/proc/self/status", "NoSuchLine"), None);
    }
}
