//! What each stage of a run was made from and what it made: `MANIFEST.json`. A stage has a record here exactly when it
//! is complete.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::UNIX_EPOCH,
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{
    error::{Error, Result},
    plan::{Plan, embedded_name},
    qc::hash::{hash, mix},
    run_dir::{RunDir, files_below, sha256, sha256_bytes, stream_jsonl},
    stage::{Ctx, Stage, Summary},
};

const MANIFEST: &str = "MANIFEST.json";
const STARTED: &str = ".started.json";
const HASHES: &str = ".hashes.json";

/// Every image that rows name, and the directory of those that are made here.
const PICTURES: &str = "images.jsonl";
const IMAGES: &str = "images";

/// Input that stands for the images outside the run directory.
const IMAGE_FILES: &str = "image files";

/// Reason to run: never started on these inputs.
pub const STARTS: &str = "starts";

/// Reason to run: started on these inputs but not ended.
pub const CONTINUES: &str = "continues";

/// Documentation inside an artefact.
const CARD: &str = "README.md";

/// Written instead of a hash where there is no file.
const ABSENT: &str = "absent";

/// Smaller files are always read again; larger ones only when size or time of change differ.
const ALWAYS_READ: u64 = 64 << 20;

/// Names and hashes.
pub type Hashes = BTreeMap<String, String>;

/// A complete stage.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// What the result depends on: program version, plan sections, files, device.
    pub inputs: Hashes,
    /// SHA-256 of every file and directory it wrote.
    pub outputs: Hashes,
    /// What it counted.
    pub summary: Summary,
    /// How long it took.
    pub seconds: f64,
}

/// Records of a run directory.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of the program that wrote this.
    pub medtune: String,
    /// Complete stages by name.
    pub stages: BTreeMap<String, Record>,
    #[serde(skip)]
    all: &'static [Stage],
    /// Inputs of stages when they were last started; kept apart, because the manifest only knows complete stages.
    #[serde(skip)]
    started: BTreeMap<String, Hashes>,
    #[serde(skip)]
    cache: BTreeMap<String, (u64, u64, String)>,
}

impl Manifest {
    /// Reads the records of a directory, empty for a new one; `all` are the stages in order.
    ///
    /// # Errors
    /// They are there but cannot be read.
    pub fn load(run: &RunDir, all: &'static [Stage]) -> Result<Self> {
        let mut manifest: Self = if run.path(MANIFEST).exists() { run.read_json(MANIFEST)? } else { Self::default() };
        manifest.medtune = env!("CARGO_PKG_VERSION").to_string();
        manifest.all = all;
        manifest.started = if run.path(STARTED).exists() { run.read_json(STARTED)? } else { BTreeMap::new() };
        // Only a cache: unreadable means empty.
        manifest.cache = run.read_json(HASHES).unwrap_or_default();
        Ok(manifest)
    }

    /// What the result of `stage` depends on, as it is now.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn inputs(&mut self, stage: &Stage, plan: &Plan, run: &RunDir, ctx: &Ctx) -> Result<Hashes> {
        let mut deciding = plan.clone();
        deciding.train = plan.train.deciding();
        let sections = serde_json::to_value(deciding).unwrap_or_default();
        let mut inputs = Hashes::new();
        inputs.insert("program".into(), env!("CARGO_PKG_VERSION").into());
        for section in stage.sections.iter().chain(&["recipe", "seed"]) {
            let value = sections.pointer(&format!("/{}", section.replace('.', "/"))).unwrap_or_default();
            inputs.insert(format!("[{section}]"), sha256_bytes(value.to_string().as_bytes()));
        }
        if stage.device {
            inputs.insert("device".into(), ctx.device_spec.kind().into());
        }
        let external = [
            ("data", "data.path", plan.data.path.as_deref()),
            ("model", "model.checkpoint", plan.model.checkpoint.as_deref()),
            ("model", "model.vision_tower", plan.model.vision_tower.as_deref()),
            ("adapter", "adapter.adapter_name_or_path", plan.adapter.adapter_name_or_path.as_deref()),
            ("train", "train.preference_data", plan.train.preference_data.as_deref()),
            ("judge", "judge.prompt", plan.judge.prompt.as_deref()),
            ("judge", "judge.anchor_file", plan.judge.anchor_file.as_deref()),
        ];
        for (section, key, path) in external {
            if let Some(path) = path.filter(|p| stage.sections.contains(&section) && embedded_name(p).is_none()) {
                inputs.insert(key.into(), self.hash(path)?);
            }
        }
        if ["construct", "qc", "judge"].iter().any(|section| stage.sections.contains(section)) {
            // Rows made, checked or judged with other texts are other rows.
            let prompts = plan.recipe()?.prompts();
            if !prompts.is_empty() {
                let all = serde_json::to_string(&prompts).unwrap_or_default();
                inputs.insert("prompts".into(), sha256_bytes(all.as_bytes()));
            }
        }
        for name in stage.reads {
            let hash = match self.upstream(stage, name) {
                Some(hash) => hash,
                None => self.hash(&run.path(name))?,
            };
            inputs.insert((*name).into(), hash);
        }
        if stage.sections.contains(&"data.firewall") {
            for (name, (_, path)) in plan.data.firewall.eval_sets.iter().zip(plan.data.firewall.parsed()?) {
                inputs.insert(format!("evaluation set {name}"), self.hash(&path)?);
            }
        }
        if stage.reads.contains(&IMAGES) || stage.writes.contains(&PICTURES) {
            inputs.insert(IMAGE_FILES.into(), outside_images(run)?);
        }
        Ok(inputs)
    }

    /// Why `stage` has to run, or none if its record still holds.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn reason(&mut self, stage: &Stage, plan: &Plan, run: &RunDir, ctx: &Ctx) -> Result<Option<String>> {
        let inputs = self.inputs(stage, plan, run, ctx)?;
        let Some(record) = self.stages.get(stage.name).cloned() else {
            let same = self.started.get(stage.name).is_some_and(|s| *s == known_at_start(stage, inputs));
            return Ok(Some(if same { CONTINUES } else { STARTS }.into()));
        };
        if let Some(name) = difference(&record.inputs, &inputs) {
            return Ok(Some(format!("{name} changed")));
        }
        for (name, hash) in &record.outputs {
            let (amender, expected) = match self.amender(stage, name) {
                Some((later, amended)) => (Some(later), amended),
                None => (None, hash.clone()),
            };
            if self.hash(&run.path(name))? != expected {
                return Ok(Some(format!("{name} is not what it wrote")));
            }
            // A later stage that will run again must start from this stage's own version of the file.
            if let Some(later) = amender.filter(|_| expected != *hash) {
                let now = self.inputs(later, plan, run, ctx)?;
                if self.stages.get(later.name).is_none_or(|r| r.inputs != now) {
                    return Ok(Some(format!("{} has to run again and had changed {name}", later.name)));
                }
            }
        }
        Ok(None)
    }

    /// Notes that `stage` starts: its record is dropped, and what it made from other inputs is removed.
    ///
    /// # Errors
    /// Files cannot be removed or written.
    pub fn start(&mut self, stage: &Stage, plan: &Plan, run: &RunDir, ctx: &Ctx) -> Result<()> {
        let inputs = known_at_start(stage, self.inputs(stage, plan, run, ctx)?);
        if self.stages.remove(stage.name).is_some() {
            self.save(run)?;
        }
        if self.started.get(stage.name) != Some(&inputs) {
            self.clear(stage, run)?;
            self.started.insert(stage.name.into(), inputs);
            run.write_json(STARTED, &self.started)?;
        }
        Ok(())
    }

    /// Notes that `stage` is complete.
    ///
    /// # Errors
    /// Its outputs cannot be read, or the manifest cannot be written.
    pub fn finish(&mut self, stage: &Stage, run: &RunDir, summary: Summary, seconds: f64) -> Result<()> {
        let mut outputs = Hashes::new();
        for name in stage.writes {
            outputs.insert((*name).into(), self.hash(&run.path(name))?);
        }
        let mut inputs = self.started.remove(stage.name).unwrap_or_default();
        if stage.writes.contains(&PICTURES) {
            inputs.insert(IMAGE_FILES.into(), outside_images(run)?);
        }
        self.stages.insert(stage.name.into(), Record { inputs, outputs, summary, seconds });
        self.save(run)?;
        run.write_json(STARTED, &self.started)?;
        run.write_json(HASHES, &self.cache)
    }

    fn save(&self, run: &RunDir) -> Result<()> {
        run.write_json(MANIFEST, self)
    }

    /// Removes what `stage` makes, except files that it shares with an earlier stage.
    fn clear(&self, stage: &Stage, run: &RunDir) -> Result<()> {
        let earlier = || self.all.iter().take_while(|s| s.name != stage.name);
        for name in stage.writes {
            if !earlier().any(|s| s.writes.contains(name)) {
                run.remove(name)?;
            }
        }
        for entry in fs::read_dir(run.root()).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if stage.scratch.iter().any(|prefix| name.starts_with(prefix)) {
                run.remove(&name)?;
            }
        }
        Ok(())
    }

    /// Hash of `name` as the last complete stage before `stage` left it.
    fn upstream(&self, stage: &Stage, name: &str) -> Option<String> {
        let earlier = self.all.iter().take_while(|s| s.name != stage.name);
        let records = earlier.filter_map(|s| self.stages.get(s.name));
        records.filter_map(|r| r.outputs.get(name)).last().cloned()
    }

    /// The last complete stage after `stage` that also writes `name`, and the hash it left.
    fn amender(&self, stage: &Stage, name: &str) -> Option<(&'static Stage, String)> {
        let later = self.all.iter().skip_while(|s| s.name != stage.name).skip(1);
        later.filter_map(|s| Some((s, self.stages.get(s.name)?.outputs.get(name)?.clone()))).last()
    }

    /// Hash of a directory; the files of a large one are read only when one of them looks changed.
    fn hash_dir(&mut self, path: &Path) -> Result<String> {
        // Reports write what they find into the card of an adapter; nothing is computed from it.
        let files: Vec<_> = files_below(path)?.into_iter().filter(|f| !f.ends_with(CARD)).collect();
        let name = |file: &Path| file.strip_prefix(path).unwrap_or(file).to_string_lossy().into_owned();
        let (mut size, mut look) = (0, 0);
        for file in &files {
            let meta = fs::metadata(file).map_err(|e| Error::io(file, e))?;
            size += meta.len();
            look = mix(look ^ mix(meta.len()) ^ mix(changed(&meta)) ^ hash(name(file).as_bytes()));
        }
        let key = path.display().to_string();
        if let Some((known, seen, hash)) = self.cache.get(&key).filter(|_| size >= ALWAYS_READ)
            && (*known, *seen) == (size, look)
        {
            return Ok(hash.clone());
        }
        let mut all = String::new();
        for file in &files {
            all.push_str(&format!("{}\0{}\0", name(file), self.hash(file)?));
        }
        let found = sha256_bytes(all.as_bytes());
        if size >= ALWAYS_READ {
            self.cache.insert(key, (size, look, found.clone()));
        }
        Ok(found)
    }

    /// Hash of a file or directory; large files are read only when they look changed.
    fn hash(&mut self, path: &Path) -> Result<String> {
        let Ok(meta) = fs::metadata(path) else { return Ok(ABSENT.into()) };
        if meta.is_dir() {
            return self.hash_dir(path);
        }
        if meta.len() < ALWAYS_READ {
            return sha256(path);
        }
        let changed = changed(&meta);
        let key = path.display().to_string();
        if let Some((size, time, hash)) = self.cache.get(&key)
            && (*size, *time) == (meta.len(), changed)
        {
            return Ok(hash.clone());
        }
        let hash = sha256(path)?;
        self.cache.insert(key, (meta.len(), changed, hash.clone()));
        Ok(hash)
    }
}

/// Inputs of a stage without those that only its own result names.
fn known_at_start(stage: &Stage, mut inputs: Hashes) -> Hashes {
    if stage.writes.contains(&PICTURES) {
        inputs.remove(IMAGE_FILES);
    }
    inputs
}

/// Names, sizes and times of change of the images that rows refer to outside the run directory, missing ones included.
fn outside_images(run: &RunDir) -> Result<String> {
    #[derive(Deserialize)]
    struct Named {
        path: PathBuf,
    }
    if !run.path(PICTURES).exists() {
        return Ok(ABSENT.into());
    }
    let mut all = Sha256::new();
    for picture in stream_jsonl::<Named>(&run.path(PICTURES))? {
        let path = picture?.path;
        if !path.starts_with(run.root()) {
            let look = fs::metadata(&path).map_or_else(|_| ABSENT.into(), |m| format!("{} {}", m.len(), changed(&m)));
            all.update(format!("{}\0{look}\0", path.display()));
        }
    }
    Ok(all.finalize().iter().map(|b| format!("{b:02x}")).collect())
}

/// Time of the last change in nanoseconds, 0 where the system does not know.
fn changed(meta: &fs::Metadata) -> u64 {
    let since = meta.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok());
    since.map_or(0, |d| d.as_nanos() as u64)
}

/// First name whose hash differs.
fn difference(old: &Hashes, new: &Hashes) -> Option<String> {
    let names = old.keys().chain(new.keys());
    names.into_iter().find(|name| old.get(*name) != new.get(*name)).cloned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{device::DeviceSpec, error::Error, progress::Progress};

    fn stage(
        name: &'static str,
        reads: &'static [&'static str],
        writes: &'static [&'static str],
        sections: &'static [&'static str],
        run: fn(&Plan, &RunDir, &Ctx) -> Result<Summary>,
    ) -> Stage {
        Stage { name, about: "", reads, writes, scratch: &["part-"], sections, device: false, run }
    }

    fn make(_: &Plan, run: &RunDir, _: &Ctx) -> Result<Summary> {
        run.write_jsonl("rows", [1, 2, 3])?;
        Ok(Summary::default())
    }

    /// Drops rows above `eval.rows` from the file that `make` wrote.
    fn amend(plan: &Plan, run: &RunDir, _: &Ctx) -> Result<Summary> {
        let rows: Vec<usize> = run.read_jsonl("rows")?;
        run.write_jsonl("rows", rows.into_iter().filter(|r| *r <= plan.eval.rows))?;
        run.write("checked", b"yes")?;
        Ok(Summary::default())
    }

    fn last(_: &Plan, run: &RunDir, ctx: &Ctx) -> Result<Summary> {
        if run.path("part-1").exists() {
            run.write("end", b"continued")?;
            return Ok(Summary::default());
        }
        run.write("part-1", b"")?;
        ctx.stop.store(true, std::sync::atomic::Ordering::Relaxed);
        Err(ctx.check().err().unwrap_or_else(|| Error::new(crate::Kind::Run, "no interrupt")))
    }

    struct Bench {
        _dir: tempfile::TempDir,
        run: RunDir,
        ctx: Ctx,
        plan: Plan,
        stages: &'static [Stage],
    }

    impl Bench {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let stages = vec![
                stage("make", &[], &["rows"], &["data"], make),
                stage("amend", &["rows"], &["rows", "checked"], &["eval"], amend),
                stage("last", &["rows"], &["end"], &[], last),
            ];
            let mut plan = Plan::default();
            plan.eval.rows = 2;
            Self {
                run: RunDir::open(dir.path().join("run")).unwrap(),
                _dir: dir,
                ctx: Ctx::new(DeviceSpec::Cpu, Progress::Silent).unwrap(),
                plan,
                stages: Box::leak(stages.into_boxed_slice()),
            }
        }

        /// Names of the stages that ran.
        fn walk(&mut self, upto: usize) -> Vec<&'static str> {
            self.ctx.stop = Default::default();
            let mut manifest = Manifest::load(&self.run, self.stages).unwrap();
            let mut ran = Vec::new();
            for stage in &self.stages[..upto] {
                if manifest.reason(stage, &self.plan, &self.run, &self.ctx).unwrap().is_none() {
                    continue;
                }
                ran.push(stage.name);
                manifest.start(stage, &self.plan, &self.run, &self.ctx).unwrap();
                match (stage.run)(&self.plan, &self.run, &self.ctx) {
                    Ok(summary) => manifest.finish(stage, &self.run, summary, 0.0).unwrap(),
                    Err(_) => break,
                }
            }
            ran
        }

        fn rows(&self) -> Vec<usize> {
            self.run.read_jsonl("rows").unwrap()
        }
    }

    #[test]
    fn unchanged_stages_are_skipped_and_changed_ones_run_again() {
        let mut bench = Bench::new();
        assert_eq!(bench.walk(2), ["make", "amend"]);
        assert_eq!(bench.rows(), [1, 2]);
        assert!(bench.walk(2).is_empty());
        bench.plan.train.learning_rate *= 2.0;
        assert!(bench.walk(2).is_empty(), "no stage depends on [train]");
        bench.run.write("checked", b"no").unwrap();
        assert_eq!(bench.walk(2), ["amend"]);
        bench.plan.seed += 1;
        assert_eq!(bench.walk(2), ["make", "amend"]);
    }

    #[test]
    fn an_image_outside_that_changed_is_noticed() {
        let mut bench = Bench::new();
        let image = bench.run.root().with_file_name("image.png");
        fs::write(&image, "1").unwrap();
        bench.run.write_jsonl(PICTURES, [serde_json::json!({ "path": image })]).unwrap();
        bench.stages = Box::leak(Box::new([stage("make", &[IMAGES], &["rows"], &[], make)]));
        assert_eq!(bench.walk(1), ["make"]);
        assert!(bench.walk(1).is_empty());
        fs::write(&image, "22").unwrap();
        assert_eq!(bench.walk(1), ["make"]);
    }

    /// Names an image that its rows lack.
    fn name_images(_: &Plan, run: &RunDir, _: &Ctx) -> Result<Summary> {
        let image = run.root().with_file_name("later.png");
        run.write_jsonl(PICTURES, [serde_json::json!({ "path": image })])?;
        Ok(Summary::default())
    }

    #[test]
    fn a_missing_image_that_arrives_makes_its_stage_run_again() {
        let mut bench = Bench::new();
        bench.stages = Box::leak(Box::new([stage("build", &[], &[PICTURES], &[], name_images)]));
        assert_eq!(bench.walk(1), ["build"]);
        assert!(bench.walk(1).is_empty());
        fs::write(bench.run.root().with_file_name("later.png"), "1").unwrap();
        assert_eq!(bench.walk(1), ["build"]);
        assert!(bench.walk(1).is_empty());
    }

    #[test]
    fn a_large_directory_is_read_again_only_when_it_looks_changed() {
        let bench = Bench::new();
        bench.run.write("d/large", &vec![1; ALWAYS_READ as usize]).unwrap();
        bench.run.write("d/small", b"1").unwrap();
        let mut manifest = Manifest::load(&bench.run, bench.stages).unwrap();
        let dir = bench.run.path("d");
        let first = manifest.hash(&dir).unwrap();
        assert!(manifest.cache.contains_key(&dir.display().to_string()));
        assert_eq!(manifest.hash(&dir).unwrap(), first);
        bench.run.write("d/small", b"22").unwrap();
        assert_ne!(manifest.hash(&dir).unwrap(), first);
    }

    #[test]
    fn an_amended_file_is_made_anew_when_the_amender_changes() {
        let mut bench = Bench::new();
        bench.walk(2);
        bench.plan.eval.rows = 3;
        assert_eq!(bench.walk(2), ["make", "amend"]);
        assert_eq!(bench.rows(), [1, 2, 3]);
        bench.plan.eval.rows = 5;
        assert_eq!(bench.walk(2), ["amend"], "nothing had been amended, so nothing has to be made anew");
    }

    #[test]
    fn an_interrupted_stage_continues_but_not_from_other_inputs() {
        let mut bench = Bench::new();
        assert_eq!(bench.walk(3), ["make", "amend", "last"]);
        assert!(bench.run.path("part-1").exists() && !bench.run.path("end").exists());
        assert_eq!(bench.walk(3), ["last"]);
        assert_eq!(fs::read(bench.run.path("end")).unwrap(), b"continued");
        bench.plan.seed += 1;
        assert_eq!(bench.walk(3), ["make", "amend", "last"]);
        assert!(!bench.run.path("end").exists(), "made from another seed");
    }

    #[test]
    fn the_manifest_has_only_complete_stages() {
        let mut bench = Bench::new();
        bench.walk(3);
        let manifest: serde_json::Value = bench.run.read_json(MANIFEST).unwrap();
        let stages: Vec<_> = manifest["stages"].as_object().unwrap().keys().collect();
        assert_eq!(stages, ["amend", "make"]);
        assert_eq!(manifest["stages"]["amend"]["outputs"]["checked"], sha256_bytes(b"yes"));
    }
}
