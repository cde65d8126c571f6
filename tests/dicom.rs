//! DICOM files beside what pydicom makes of them, and damaged ones.

use std::path::PathBuf;

use medtune::{
    error::Kind,
    image::{dicom, probe},
    run_dir::files_below,
};
use rand::{RngExt, SeedableRng};

/// An element in explicit little endian.
fn element(group: u16, number: u16, vr: &str, value: &[u8]) -> Vec<u8> {
    let mut out = [group.to_le_bytes(), number.to_le_bytes()].concat();
    out.extend(vr.bytes());
    match vr {
        "OB" | "OW" | "UN" | "SQ" => {
            out.extend([0, 0]);
            out.extend((value.len() as u32).to_le_bytes());
        }
        _ => out.extend((value.len() as u16).to_le_bytes()),
    }
    out.extend(value);
    out
}

fn even(text: &str) -> Vec<u8> {
    let mut bytes = text.as_bytes().to_vec();
    if bytes.len() % 2 == 1 {
        bytes.push(b' ');
    }
    bytes
}

/// A file of 16-bit grey values.
fn file(photometric: &str, values: &[i16], columns: u16, more: &[Vec<u8>]) -> Vec<u8> {
    let mut meta = element(2, 0x10, "UI", b"1.2.840.10008.1.2.1\0");
    meta.splice(0..0, element(2, 2, "UI", b"1.2.840.10008.5.1.4.1.1.7\0"));
    meta.splice(0..0, element(2, 1, "OB", &[0, 1]));
    let mut out = vec![0; 128];
    out.extend(b"DICM");
    out.extend(element(2, 0, "UL", &(meta.len() as u32).to_le_bytes()));
    out.extend(meta);
    let us = |number, value: u16| element(0x28, number, "US", &value.to_le_bytes());
    let mut body = vec![
        element(0x08, 0x60, "CS", b"CT"),
        element(0x10, 0x10, "PN", &even("Planted^Name")),
        us(2, 1),
        element(0x28, 4, "CS", &even(photometric)),
        us(0x10, values.len() as u16 / columns),
        us(0x11, columns),
        us(0x100, 16),
        us(0x101, 12),
        us(0x102, 11),
        us(0x103, 1),
    ];
    body.extend(more.iter().cloned());
    body.sort();
    body.push(element(0x7FE0, 0x10, "OW", &values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>()));
    body.sort_by_key(|e| (u16::from_le_bytes([e[0], e[1]]), u16::from_le_bytes([e[2], e[3]])));
    out.extend(body.concat());
    out
}

fn shades(bytes: &[u8]) -> Vec<u8> {
    dicom::decode(bytes, 0, "x").unwrap().0.data.iter().step_by(3).copied().collect()
}

#[test]
fn windows_rescale_and_inversion() {
    let window = |c: &str, w: &str| vec![element(0x28, 0x1050, "DS", &even(c)), element(0x28, 0x1051, "DS", &even(w))];
    let values = [-1024i16, -100, 0, 40, 100, 2000];
    // The linear function of PS3.3 C.11.2.1.2: ((x - (c - 0.5)) / (w - 1) + 0.5) * 255.
    let expected: Vec<u8> =
        values.iter().map(|v| (((f64::from(*v) - 39.5) / 399.0 + 0.5).clamp(0.0, 1.0) * 255.0).round() as u8).collect();
    assert_eq!(shades(&file("MONOCHROME2", &values, 3, &window("40", "400"))), expected);
    let inverted: Vec<u8> = expected.iter().map(|v| 255 - v).collect();
    assert_eq!(shades(&file("MONOCHROME1", &values, 3, &window("40", "400"))), inverted);
    // The first of several windows; slope 2 and intercept -100 before it.
    let mut more = window("40\\5", "400\\6");
    more.extend([element(0x28, 0x1052, "DS", b"-100"), element(0x28, 0x1053, "DS", b"2 ")]);
    let halves: Vec<i16> = values.iter().map(|v| (v + 100) / 2).collect();
    assert_eq!(shades(&file("MONOCHROME2", &halves, 3, &more)), expected);
    // Without a window from the smallest to the largest; bits above the stored ones do not count.
    let high = [0x7000u16 as i16, 0x7001, 0x7003, 0x7004];
    assert_eq!(shades(&file("MONOCHROME2", &high, 2, &[])), [0, 64, 191, 255]);
}

#[test]
fn what_a_header_says_of_a_person_is_named_and_not_returned() {
    let burned = element(0x28, 0x0301, "CS", b"YES ");
    let bytes = file("MONOCHROME2", &[0, 1], 2, &[burned]);
    let (_, header) = dicom::decode(&bytes, 0, "x").unwrap();
    assert_eq!((header.identity.as_slice(), header.burned_in), (["PatientName"].as_slice(), Some(true)));
    assert_eq!(header.modality.as_deref(), Some("CT"));
    assert!(!format!("{header:?}").contains("Planted"));
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("a.dcm"), &bytes).unwrap();
    assert_eq!(probe(dir.path().join("a.dcm")).unwrap().format, "dicom");
    std::fs::write(dir.path().join("rows.csv"), "image,caption\na.dcm,A plain slice of the chest.\n").unwrap();
    let config = medtune::source::DataConfig { path: Some(dir.path().into()), ..Default::default() };
    let mut rows = medtune::datasets::find("table").unwrap().open(&config, 0, dir.path()).unwrap();
    let row = rows.next().unwrap().unwrap();
    assert!(rows.next().is_none());
    assert_eq!(row.images[0].path.extension().unwrap(), "png");
    assert_eq!((row.meta["burned_in_annotation"].as_bool(), row.meta["modality"].as_str()), (Some(true), Some("CT")));
    let notes: String = rows.notes().all().iter().filter(|n| n.warning).map(|n| n.text.clone()).collect();
    assert!(notes.contains("PatientName") && notes.contains("burned into"), "{notes}");
    let everything = format!("{row:?}{notes}") + &String::from_utf8_lossy(&std::fs::read(&row.images[0].path).unwrap());
    assert!(!everything.contains("Planted"));
}

#[test]
fn cut_and_damaged_files_are_errors_and_never_panics() {
    let bytes = file("MONOCHROME2", &[1; 64], 8, &[]);
    for length in (0..bytes.len()).step_by(11) {
        let error = dicom::decode(&bytes[..length], 0, "x").expect_err("a cut file");
        assert_eq!(error.kind(), Kind::Image, "cut to {length}");
    }
    assert!(dicom::decode(&bytes, 1, "x").unwrap_err().to_string().contains("no such frame"));
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(5);
    for _ in 0..100 {
        let mut damaged = bytes.clone();
        for _ in 0..rng.random_range(1..5) {
            let at = rng.random_range(132..damaged.len());
            damaged[at] = rng.random();
        }
        let _ = dicom::decode(&damaged, 0, "x");
    }
}

/// With `MEDTUNE_DICOM` set to a folder of DICOM files and `MEDTUNE_PYTHON` to a Python with pydicom (see
/// `tests/tools/dicom_pixels.py`): every file that pydicom can decode has its pixels here within one grey level, or an
/// error that names the transfer syntax; every other file is an error here, too, or a picture pydicom does not know.
#[test]
fn pixels_are_those_of_pydicom() {
    let (Some(folder), Some(python)) = (std::env::var_os("MEDTUNE_DICOM"), std::env::var_os("MEDTUNE_PYTHON")) else {
        println!("dicom: MEDTUNE_DICOM and MEDTUNE_PYTHON are not set");
        return;
    };
    let mut files: Vec<PathBuf> = files_below(&PathBuf::from(folder)).unwrap();
    files.retain(|f| f.extension().is_some_and(|e| e == "dcm"));
    let out = tempfile::tempdir().unwrap();
    let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/tools/dicom_pixels.py");
    let done = std::process::Command::new(python).arg(script).arg(out.path()).args(&files).status().unwrap();
    assert!(done.success());
    let index: serde_json::Value =
        serde_json::from_slice(&std::fs::read(out.path().join("index.json")).unwrap()).unwrap();
    let (mut same, mut no_decoder, mut both_fail, mut ours_alone) = (0, 0, 0, 0);
    for (n, entry) in index["files"].as_array().unwrap().iter().enumerate() {
        let (bytes, name) = (std::fs::read(&files[n]).unwrap(), files[n].display().to_string());
        let found = dicom::decode(&bytes, 0, &name);
        // Large pictures take long to decode.
        let cuts = if bytes.len() < 60_000 { 12 } else { 2 };
        for length in (0..bytes.len()).step_by(bytes.len() / cuts + 1) {
            let _ = dicom::decode(&bytes[..length], 0, &name);
        }
        match (found, entry["error"].as_str()) {
            (Ok((picture, _)), None) => {
                let read = |kind: &str| std::fs::read(out.path().join(format!("{n}.{kind}"))).unwrap();
                let shown = read("shown");
                assert_eq!(shown.len(), picture.data.len(), "{name}");
                let off = picture.data.iter().zip(&shown).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
                let stored: Vec<f64> =
                    read("stored").chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect();
                let ours = dicom::stored(&bytes, 0, &name).unwrap();
                let raw = ours.iter().zip(&stored).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
                println!("dicom {name}: shown within {off}, stored within {raw}");
                assert!(off <= 1 && raw <= 1.0 && ours.len() == stored.len(), "{name}: {off}, {raw}");
                same += 1;
            }
            (Err(error), None) => {
                println!("dicom {name}: {error}");
                assert!(error.to_string().contains("1.2.840.10008.1.2.4."), "{error}");
                no_decoder += 1;
            }
            (Err(error), Some(_)) => {
                println!("dicom {name}: {error}");
                assert!(error.help_line().is_some());
                both_fail += 1;
            }
            (Ok(_), Some(other)) => {
                println!("dicom {name}: read here; pydicom says {other}");
                ours_alone += 1;
            }
        }
    }
    println!(
        "dicom: {} files; {same} with pydicom's pixels, {no_decoder} without a decoder here, {both_fail} errors in \
         both, {ours_alone} read here alone",
        files.len()
    );
    assert!(same > 0);
}
