//! Command line types.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::{
    ablate::Axis,
    adapter::{Quantization, peft::AdapterRef},
    device::DeviceSpec,
    export::{Format, View},
    fit::Size,
    kernel::Kernels,
    score::read::Part,
    weights::Dtype,
};

/// Builds hallucination-aware instruction data for medical vision-language models, checks it, fine-tunes on it and
/// judges the result.
#[derive(Debug, Parser)]
#[command(
    name = "medtune",
    version,
    arg_required_else_help = true,
    disable_help_subcommand = true,
    after_help = "Start here:\n  medtune run phantom                 the whole path on synthetic images, on the CPU\n  medtune plan phantom                what that would do, value by value\n  medtune recipes show phantom        the recipe file, to copy and change\n\nExit codes: 0 done, 1 a gate said no, 2 the work could not be done.\nNothing is downloaded but by `medtune data get`, and only recipes that name a language-model or MLflow server (or MLFLOW_TRACKING_URI) send anything over a network."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
    /// What every verb understands.
    #[command(flatten)]
    pub global: Global,
}

/// Flags that every verb understands.
#[derive(Debug, Clone, Args)]
pub struct Global {
    /// Print results (and errors) as JSON on standard output
    #[arg(long, global = true, help_heading = "Everywhere")]
    pub json: bool,
    /// Show no progress; results and errors are still printed
    #[arg(long, short, global = true, help_heading = "Everywhere")]
    pub quiet: bool,
    /// Where tensors live: cpu, wgpu[:i], vulkan[:i], cuda[:i], or auto for the best; `medtune devices` lists them
    #[arg(long, global = true, default_value = "cpu", value_name = "DEVICE", help_heading = "Everywhere")]
    pub device: DeviceSpec,
    /// Kernels of medtune's own, or operations composed of Burn's: to tell which one a wrong number comes from
    #[arg(long, global = true, value_enum, value_name = "WHICH", help_heading = "Everywhere")]
    pub kernels: Option<Kernels>,
}

/// A recipe with overrides, and where its results go.
#[derive(Debug, Clone, Args)]
pub struct RecipeArgs {
    /// Name of an embedded recipe (`medtune recipes`) or path of a TOML file
    pub recipe: String,
    /// Run directory [default: run/<recipe name>]
    #[arg(long, short, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Changes of the recipe.
    #[command(flatten)]
    pub changes: Overrides,
    /// Make training fit into this much memory, for example 20GiB: gives up as little as it must, and says what
    #[arg(long, value_name = "SIZE")]
    pub fit: Option<Size>,
}

impl RecipeArgs {
    /// All overrides, those that have a flag of their own included.
    #[must_use]
    pub fn overrides(&self) -> Vec<String> {
        self.changes.all()
    }
}

/// Changes of a recipe.
#[derive(Debug, Clone, Default, Args)]
pub struct Overrides {
    /// Override a value, for example --set train.learning_rate=1e-4; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Hard limit on what language-model servers may cost, in US dollars; short for --set llm.max_usd=USD
    #[arg(long, value_name = "USD")]
    pub max_usd: Option<f64>,
    /// Hard limit on requests to language-model servers; short for --set llm.max_requests=N
    #[arg(long, value_name = "N")]
    pub max_requests: Option<u64>,
}

impl Overrides {
    /// All of them, those that have a flag of their own included.
    #[must_use]
    pub fn all(&self) -> Vec<String> {
        let usd = self.max_usd.map(|n| format!("llm.max_usd={n}"));
        let requests = self.max_requests.map(|n| format!("llm.max_requests={n}"));
        self.set.iter().cloned().chain(usd).chain(requests).collect()
    }
}

/// What `score` needs.
#[derive(Debug, Clone, Args)]
pub struct ScoreArgs {
    /// Predictions: JSONL with question_id and answer (or text)
    #[arg(required = true, value_name = "FILE")]
    pub files: Vec<PathBuf>,
    /// Reference answers: JSONL or JSON with question_id and gpt4_answer (or reference, or answer); may be repeated
    #[arg(long, value_name = "FILE")]
    pub reference: Vec<PathBuf>,
    /// The part that all rows belong to; by default what rows, file names, or question and image say
    #[arg(long, value_name = "PART")]
    pub split: Option<Part>,
    /// Another model's predictions for the same questions, to compare with; may be repeated
    #[arg(long, value_name = "FILE")]
    pub against: Vec<PathBuf>,
    /// Judge replies for these answers (field result), for example of an earlier evaluation; may be repeated
    #[arg(long, value_name = "FILE")]
    pub replies: Vec<PathBuf>,
    /// Ask the judge of this recipe, for example medhalltune, about the answers that have no reply; --set and the limits
    /// are for it
    #[arg(long, value_name = "RECIPE")]
    pub judge: Option<String>,
    /// Changes of the judge's recipe.
    #[command(flatten)]
    pub changes: Overrides,
    /// Text metrics; by default all that need no model
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    pub metrics: Vec<String>,
    /// Published rules to apply beside our own: llava-med, medevalkit, omnimedvqa, pmc-vqa; by default all
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    pub compat: Vec<String>,
    /// Directory of the encoder for BERTScore, or its name on the hub
    #[arg(long, value_name = "DIR")]
    pub bertscore_model: Option<String>,
    /// Layer of the encoder that BERTScore compares [default: bert_score's choice for the model]
    #[arg(long, value_name = "N")]
    pub bertscore_layer: Option<usize>,
    /// Weigh tokens of BERTScore by their rarity among the references
    #[arg(long)]
    pub bertscore_idf: bool,
    /// Rescale BERTScore by the model's file of bert_score/rescale_baseline
    #[arg(long, value_name = "FILE")]
    pub bertscore_baseline: Option<PathBuf>,
    /// Download the encoder if it is not on this machine
    #[arg(long)]
    pub download: bool,
    /// Seed of intervals
    #[arg(long, default_value_t = 42, value_name = "N")]
    pub seed: u64,
    /// Directory for the results [default: score/<name of the first file>]
    #[arg(long, short, value_name = "DIR")]
    pub out: Option<PathBuf>,
}

/// A recipe and what is varied.
#[derive(Debug, Clone, Args)]
pub struct AblateArgs {
    /// The recipe; results go to run/<recipe name>_ablation unless --out says otherwise.
    #[command(flatten)]
    pub recipe: RecipeArgs,
    /// What to vary
    #[arg(long, value_delimiter = ',', default_value = "polarity,qc,fraction", value_name = "AXES")]
    pub axis: Vec<Axis>,
}

/// What `bench` measures.
#[derive(Debug, Clone, Args)]
pub struct BenchArgs {
    /// Name of an embedded recipe (`medtune recipes`) or path of a TOML file
    #[arg(required_unless_present = "preset", conflicts_with = "preset")]
    pub recipe: Option<String>,
    /// Instead of a recipe: LoRA of rank 16 on all linear modules of a preset's language model, the rest frozen
    #[arg(long, value_name = "NAME")]
    pub preset: Option<String>,
    /// Checkpoint directory, as `--set model.checkpoint=DIR`; `medtune models synth` makes one of any preset
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Override a value, for example --set train.recompute=always; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Make the step fit into this much memory, as `medtune plan --fit` does
    #[arg(long, value_name = "SIZE")]
    pub fit: Option<Size>,
    /// Rows of a micro-batch [default: that of the recipe, or 1 with --preset]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub rows: Option<u32>,
    /// Positions of a row, the image included [default: one image, a question and a short answer]
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub length: usize,
    /// Micro-batches of a step
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub micro_batches: u32,
    /// Steps before those that count, the first one included
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(0..1000))]
    pub warmup: u32,
    /// Steps that count
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pub steps: u32,
}

/// A recipe for one stage.
#[derive(Debug, Clone, Args)]
pub struct StageArgs {
    /// The recipe.
    #[command(flatten)]
    pub recipe: RecipeArgs,
    /// Run this stage even if nothing it depends on has changed
    #[arg(long)]
    pub force: bool,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Run a recipe from source rows to the report
    ///
    /// Walks the stages build, qc, encode, train, eval, judge and report. A stage whose inputs have not changed is
    /// skipped; after an interrupt (or a kill) the same command continues.
    #[command(
        after_help = "Examples:\n  medtune run phantom\n  medtune run phantom --out /tmp/try --set train.max_steps=50\n  medtune run my_recipe.toml --device cuda:0"
    )]
    Run(RecipeArgs),
    /// Run a finished run again beside it, and compare hash by hash
    ///
    /// The recipe is the run's own plan.toml; replies of language models come from the run's ledger. The table has what
    /// every stage was made from (program version, settings, data, device) and what it made. Exit code 1 if anything
    /// differs. What a clock decides is left out.
    #[command(after_help = "Example:\n  medtune repro run/phantom")]
    Repro(ReproArgs),
    /// Show the resolved plan: every value with where it came from, and what it amounts to in steps and memory
    ///
    /// Nothing is run and nothing is written; neither data nor weights nor the device need be there.
    #[command(
        after_help = "Examples:\n  medtune plan phantom\n  medtune plan my_recipe.toml --set seed=7 --json\n  medtune plan my_recipe.toml --device cuda --fit 24GiB"
    )]
    Plan(RecipeArgs),
    /// Make instruction rows from the source: samples.jsonl
    #[command(after_help = STAGE_HELP)]
    Build(AskArgs),
    /// Filter rows: each ends in kept.jsonl or, with a reason code, in rejected.jsonl
    #[command(after_help = STAGE_HELP)]
    Qc(AskArgs),
    /// Check tokens and pixels of every kept row, before a device is touched
    #[command(after_help = STAGE_HELP)]
    Encode(StageArgs),
    /// Train the adapter: adapter/
    #[command(after_help = STAGE_HELP)]
    Train(StageArgs),
    /// Answer the held-out questions with the base and the tuned model: answers.jsonl
    #[command(after_help = STAGE_HELP)]
    Eval(StageArgs),
    /// Judge the answers: verdicts.jsonl
    #[command(after_help = STAGE_HELP)]
    Judge(JudgeArgs),
    /// Write the tables with intervals: report.json and report.html
    #[command(after_help = STAGE_HELP)]
    Report(StageArgs),
    /// Score anybody's predictions against reference answers: text metrics, judge replies, VQA rules, intervals
    ///
    /// Every line ends as a scored row or, with a reason, in set_aside.jsonl. Exit code 1 if lines were set aside; the
    /// others are scored all the same.
    #[command(
        after_help = "Examples:\n  medtune score positive.jsonl negative.jsonl --reference val_positive.jsonl --reference val_negative.jsonl\n  medtune score mine.jsonl --reference kept.jsonl --against theirs.jsonl\n  medtune score mine.jsonl --split negative --replies judged.jsonl --metrics meteor,rougeL"
    )]
    Score(ScoreArgs),
    /// Train one recipe on parts of its data and compare: polarity, quality control, fraction
    ///
    /// Rows are built once; every part trains for the recipe's epochs and answers the same held-out questions. Parts that
    /// are complete and unchanged are skipped; after an interrupt the same command continues.
    #[command(after_help = "Examples:\n  medtune ablate phantom\n  medtune ablate my_recipe.toml --axis qc,fraction")]
    Ablate(AblateArgs),
    /// Measure training steps: tokens a second, share of the device's peak, memory
    ///
    /// Trains on one made-up row with an image, over and over, with the code that trains recipes. Nothing is kept.
    #[command(
        after_help = "Examples:\n  medtune bench phantom\n  medtune models synth v1.5-7b synth/7b && medtune bench --preset v1.5-7b --model synth/7b --warmup 0 --steps 1\n  medtune bench my_recipe.toml --rows 1 --length 1024 --json"
    )]
    Bench(BenchArgs),
    /// Answer one question about an image
    #[command(
        after_help = "Example:\n  medtune generate --model run/phantom/base --adapter run/phantom/adapter \\\n    --image scan.png --question \"Is there a nodule in the left lung?\""
    )]
    Generate(GenerateArgs),
    /// Fold an adapter into its model and write a whole checkpoint
    #[command(
        after_help = "Example:\n  medtune merge --model run/phantom/base --adapter run/phantom/adapter --out merged"
    )]
    Merge(MergeArgs),
    /// Take an adapter off the checkpoint that it was folded into, and write the base again
    ///
    /// Before anything is written, the base with the adapter beside it must give the same logits as the merged model, and
    /// the base alone those that it gave when `merge` or `export` wrote the checkpoint. Adapters that changed more than
    /// they added (DoRA, whole modules, biases) are refused.
    #[command(
        after_help = "Examples:\n  medtune unmerge --model merged --out base\n  medtune unmerge --model merged --adapter run/phantom/adapter --out base"
    )]
    Unmerge(UnmergeArgs),
    /// Write a model as other programs load it: Hugging Face layout, any adapter folded in
    ///
    /// DIR is a checkpoint directory or a run directory; a run's adapter is folded into its base model, and copied as it
    /// is beside the result. Before anything is written, the folded model must give the same logits as the adapted one.
    #[command(
        after_help = "Examples:\n  medtune export run/phantom --out exported\n  medtune export path/to/checkpoint --adapter path/to/adapter --out exported --dtype bfloat16"
    )]
    Export(ExportArgs),
    /// Look at the data of a recipe
    #[command(subcommand)]
    Data(DataVerb),
    /// Run a local server that speaks OpenAI's API without a model, for rehearsals and tests
    ///
    /// Listens on this machine only, unless --host says otherwise. Its answers follow rules and are the same for the
    /// same seed and words. What it has seen is at /mock/stats, and is printed when it ends.
    #[command(
        after_help = "Examples:\n  medtune mock-llm --port 8080\n  medtune mock-llm --fault 429=0.05 --fault drop=0.01 --latency-ms 50\n  medtune mock-llm --script answers.jsonl\n\nFaults: 429, 500, slow, drop, cut, not-json, filter, truncated, wrong-schema, refusal, usage,\nempty, no-json-schema, expire (of batches). docs/llm.md explains them."
    )]
    MockLlm(MockArgs),
    /// List model families, or inspect a checkpoint
    #[command(after_help = "Examples:\n  medtune models\n  medtune models inspect path/to/checkpoint")]
    Models {
        /// What to do instead of listing.
        #[command(subcommand)]
        verb: Option<ModelsVerb>,
    },
    /// List metrics with their signatures
    ///
    /// Numbers are comparable only if their signatures are equal.
    #[command(after_help = "Examples:\n  medtune metrics\n  medtune explain meteor")]
    Metrics,
    /// List data set readers
    Datasets,
    /// List recipes, or print one
    #[command(after_help = "Examples:\n  medtune recipes\n  medtune recipes show phantom > my_recipe.toml")]
    Recipes {
        /// What to do instead of listing.
        #[command(subcommand)]
        verb: Option<RecipesVerb>,
    },
    /// List devices, compiled in or not
    Devices,
    /// Check that a device computes a model right: logits, loss, gradients and ten training steps, beside the CPU
    ///
    /// Exit code 1 if anything differs by more than the limit for this kind of device.
    #[command(
        after_help = "Examples:\n  medtune verify embedded:phantom --device wgpu\n  medtune verify path/to/checkpoint --device cuda:0 --json"
    )]
    Verify(VerifyArgs),
    /// Open a device, ask it and check it against known answers; run by the program itself, in a process of its own
    #[command(name = crate::device::trust::VERB, hide = true)]
    ProbeDevice,
    /// Check that this machine and this build can work
    Doctor {
        /// Directory that must be writable
        #[arg(long, short, value_name = "DIR", default_value = ".")]
        out: PathBuf,
    },
    /// Tell the story of one row: image, source, requests and replies, checks, split, training steps, answers, verdicts
    #[command(after_help = "Example:\n  medtune trace phantom-000003-n0 run/rehearsal")]
    Trace {
        /// Id of the row
        row: String,
        /// Run directory
        run: PathBuf,
    },
    /// Explain a recipe, reader, model, stage, quality rule, metric or configuration key
    #[command(
        after_help = "Examples:\n  medtune explain phantom\n  medtune explain train.learning_rate\n  medtune explain train"
    )]
    Explain {
        /// Name of the thing, as the lists show it
        name: String,
    },
}

/// What `repro` takes.
#[derive(Debug, Clone, Args)]
pub struct ReproArgs {
    /// Run directory
    pub run: PathBuf,
    /// Directory of the second run [default: the first one's name with _repro behind it]
    #[arg(long, short, value_name = "DIR")]
    pub out: Option<PathBuf>,
}

/// What `build` and `qc` take.
#[derive(Debug, Clone, Args)]
pub struct AskArgs {
    /// The stage.
    #[command(flatten)]
    pub stage: StageArgs,
    /// Send nothing to a language model: print the first requests and what all of them would cost
    #[arg(long)]
    pub dry_run: bool,
}

/// What `judge` takes.
#[derive(Debug, Clone, Args)]
pub struct JudgeArgs {
    /// The stage.
    #[command(flatten)]
    pub stage: StageArgs,
    /// Send nothing to a language model: print the first requests and what all of them would cost
    #[arg(long)]
    pub dry_run: bool,
    /// Score the replies that are in the ledger again, without a request; answers without one count as failed
    #[arg(long, conflicts_with = "dry_run")]
    pub from_cache: bool,
    /// File with the instruction for the judging model, as `--set judge.prompt=FILE`
    #[arg(long, value_name = "FILE")]
    pub judge_prompt: Option<PathBuf>,
}

const STAGE_HELP: &str = "Earlier stages run first where their results are missing or no longer hold.\nA stage whose inputs have not changed is skipped.";

/// A checkpoint on the command line.
#[derive(Debug, Clone, Args)]
pub struct CheckpointArgs {
    /// Checkpoint directory in Hugging Face layout
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Directory with other weights for the vision tower
    #[arg(long, value_name = "DIR")]
    pub vision_tower: Option<PathBuf>,
    /// Type in which the weights are held; auto is that of the checkpoint, or float32 for a small one on the CPU
    #[arg(long, value_enum, default_value_t, value_name = "TYPE")]
    pub dtype: Dtype,
    /// Holds the linear modules of the language model in few bits; what is merged then is merged into these values
    #[arg(long, value_enum, default_value_t, value_name = "KIND")]
    pub quantization: Quantization,
}

/// What `verify` takes.
#[derive(Debug, Clone, Args)]
pub struct VerifyArgs {
    /// Checkpoint directory in Hugging Face layout, or embedded:phantom for the three that are compiled in
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,
    /// Directory with other weights for the vision tower
    #[arg(long, value_name = "DIR")]
    pub vision_tower: Option<PathBuf>,
    /// Type in which the weights are held
    #[arg(long, value_enum, default_value_t, value_name = "TYPE")]
    pub dtype: Dtype,
    /// Markdown file whose line for this model and device is written anew
    #[arg(long, value_name = "FILE")]
    pub matrix: Option<PathBuf>,
}

/// How `mock-llm` behaves.
#[derive(Debug, Clone, Args)]
pub struct MockArgs {
    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1", value_name = "IP")]
    pub host: std::net::IpAddr,
    /// Port; 0 takes a free one
    #[arg(long, default_value_t = 8080, value_name = "N")]
    pub port: u16,
    /// What it answers
    #[arg(long, default_value = "general", value_name = "NAME")]
    pub rules: String,
    /// Answers that go before the rules: lines of {"match": "regex", "reply": "text", "times": 1, "fault": "429"}
    #[arg(long, value_name = "FILE")]
    pub script: Option<PathBuf>,
    /// Seed of answers and faults
    #[arg(long, default_value_t = 42, value_name = "N")]
    pub seed: u64,
    /// How often a fault happens, for example 429=0.05; may be repeated
    #[arg(long, value_name = "NAME=RATE")]
    pub fault: Vec<String>,
    /// Most times in a row that one request fails
    #[arg(long, default_value_t = 2, value_name = "N")]
    pub fault_repeats: u32,
    /// Retry-After of a 429, in seconds
    #[arg(long, default_value_t = 1.0, value_name = "S")]
    pub retry_after: f64,
    /// Delay of a slow answer, in milliseconds
    #[arg(long, default_value_t = 5000, value_name = "MS")]
    pub slow_ms: u64,
    /// Time that every answer takes, in milliseconds
    #[arg(long, default_value_t = 0, value_name = "MS")]
    pub latency_ms: u64,
    /// Least length of a text answer, in bytes
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub reply_bytes: usize,
    /// Ignore idempotency keys: a request that comes again is paid for again
    #[arg(long)]
    pub forgetful: bool,
    /// Name of an environment variable with the key that requests must present
    #[arg(long, value_name = "NAME")]
    pub key_env: Option<String>,
}

/// What `generate` needs.
#[derive(Debug, Clone, Args)]
pub struct GenerateArgs {
    /// The model.
    #[command(flatten)]
    pub checkpoint: CheckpointArgs,
    /// Adapter directory in PEFT layout, with a weight if it is not to count in full; repeat to add several
    #[arg(long, value_name = "DIR[:WEIGHT]")]
    pub adapter: Vec<AdapterRef>,
    /// Image file; repeat for several images, leave out for none
    #[arg(long, value_name = "FILE")]
    pub image: Vec<PathBuf>,
    /// What to ask; `<image>` marks the places of the images, in front of the text by default
    #[arg(long, value_name = "TEXT")]
    pub question: String,
    /// Most tokens of the answer
    #[arg(long, default_value_t = 256, value_name = "N")]
    pub max_new_tokens: usize,
    /// 0 always takes the most likely token
    #[arg(long, default_value_t = 0.0, value_name = "T")]
    pub temperature: f64,
    /// Beams; 1 means no beam search
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub num_beams: usize,
    /// Seed of sampling
    #[arg(long, default_value_t = 42, value_name = "N")]
    pub seed: u64,
}

/// What `merge` needs.
#[derive(Debug, Clone, Args)]
pub struct MergeArgs {
    /// The model the adapter was trained on.
    #[command(flatten)]
    pub checkpoint: CheckpointArgs,
    /// Adapter directory in PEFT layout, with a weight if it is not to count in full; repeat to add several
    #[arg(long, value_name = "DIR[:WEIGHT]", required = true)]
    pub adapter: Vec<AdapterRef>,
    /// Directory for the merged checkpoint
    #[arg(long, short, value_name = "DIR")]
    pub out: PathBuf,
}

/// What `unmerge` needs.
#[derive(Debug, Clone, Args)]
pub struct UnmergeArgs {
    /// Merged checkpoint
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Adapter that was folded in, in PEFT layout, with the weight that it had; may be repeated [default: those that
    /// `merge` left beside the model]
    #[arg(long, value_name = "DIR[:WEIGHT]")]
    pub adapter: Vec<AdapterRef>,
    /// Directory with other weights for the vision tower
    #[arg(long, value_name = "DIR")]
    pub vision_tower: Option<PathBuf>,
    /// Type in which the weights are held and written; auto is that of the checkpoint, or float32 for a small one on the
    /// CPU
    #[arg(long, value_enum, default_value_t, value_name = "TYPE")]
    pub dtype: Dtype,
    /// Directory for the base
    #[arg(long, short, value_name = "DIR")]
    pub out: PathBuf,
}

/// What `export` needs.
#[derive(Debug, Clone, Args)]
pub struct ExportArgs {
    /// Checkpoint directory or run directory
    pub dir: PathBuf,
    /// Adapter directory in PEFT layout, with a weight if it is not to count in full; repeat to add several [default:
    /// that of the run]
    #[arg(long, value_name = "DIR[:WEIGHT]")]
    pub adapter: Vec<AdapterRef>,
    /// Directory with other weights for the vision tower
    #[arg(long, value_name = "DIR")]
    pub vision_tower: Option<PathBuf>,
    /// Type in the written files; auto is that of the checkpoint, or that in which an adapter was folded in
    #[arg(long, value_enum, default_value_t, value_name = "TYPE")]
    pub dtype: Dtype,
    /// Holds the linear modules of the language model in few bits, and writes the values that they have so
    #[arg(long, value_enum, default_value_t, value_name = "KIND")]
    pub quantization: Quantization,
    /// Largest file, in GB
    #[arg(long, default_value_t = 5.0, value_name = "GB")]
    pub max_shard_size: f64,
    /// Directory for the result
    #[arg(long, short, value_name = "DIR")]
    pub out: PathBuf,
}

/// What `models inspect` needs.
#[derive(Debug, Clone, Args)]
pub struct InspectArgs {
    /// Checkpoint directory in Hugging Face layout
    pub dir: PathBuf,
    /// Directory with other weights for the vision tower
    #[arg(long, value_name = "DIR")]
    pub vision_tower: Option<PathBuf>,
    /// Load the weights as well, and say how long it took and how much memory it needed
    #[arg(long)]
    pub load: bool,
    /// Type in which `--load` holds the weights; auto is that of the checkpoint, or float32 for a small one on the CPU
    #[arg(long, value_enum, default_value_t, value_name = "TYPE")]
    pub dtype: Dtype,
}

/// What `models synth` needs.
#[derive(Debug, Clone, Args)]
pub struct SynthArgs {
    /// Shape: a preset of `medtune models`, with its family in front where two have it (`llava_med/tiny`)
    pub preset: String,
    /// Directory for the checkpoint
    pub dir: PathBuf,
    /// Seed of the weights
    #[arg(long, default_value_t = 42, value_name = "N")]
    pub seed: u64,
    /// Type in the files; auto is that of the release
    #[arg(long, value_enum, default_value_t, value_name = "TYPE")]
    pub dtype: Dtype,
    /// Directory whose tokenizer files are used instead of made-up ones
    #[arg(long, value_name = "DIR")]
    pub tokenizer: Option<PathBuf>,
}

/// Ways to look at data.
#[derive(Debug, Subcommand)]
pub enum DataVerb {
    /// Read every row and image of the source and count
    ///
    /// Exit code 1 if a row or an image cannot be used.
    #[command(after_help = "Example:\n  medtune data check my_recipe.toml")]
    Check(RecipeArgs),
    /// Show one row as the model sees it: each token with its label and image span
    #[command(after_help = "Example:\n  medtune data show phantom --row 12")]
    Show {
        /// The recipe.
        #[command(flatten)]
        recipe: RecipeArgs,
        /// Position of the row in kept.jsonl, from 0
        #[arg(long, value_name = "N", default_value_t = 0)]
        row: usize,
    },
    /// Let people look at a sample of the rows, and read back what they found
    ///
    /// Writes one page that works offline; marks stay in the browser until they are saved as a file. With --read, says
    /// how much error is left in the kept rows and how far reviewers agree.
    #[command(
        after_help = "Examples:\n  medtune data review run/phantom --n 200 --out review\n  medtune data review --read marks-anna.json --read marks-ben.json"
    )]
    Review(ReviewArgs),
    /// Write the kept rows in a form that others read, with their images and a data card
    #[command(
        after_help = "Examples:\n  medtune data export run/phantom data/phantom --format llava\n  medtune data export run/phantom data/half --format parquet --view positive+50%"
    )]
    Export(DataExportArgs),
    /// Print the data card of a run: what its rows are, where they came from, what was dropped
    #[command(after_help = "Example:\n  medtune data card run/phantom > README.md")]
    Card {
        /// Run directory
        run: PathBuf,
    },
    /// Look for test images and questions in the training rows
    ///
    /// Exit code 1 if there are any.
    #[command(after_help = "Example:\n  medtune data leak my_recipe.toml")]
    Leak(RecipeArgs),
    /// Download a public data set from the Hugging Face hub
    ///
    /// The only verb that downloads data. HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE are respected; an
    /// interrupted download continues. SOURCE.json beside the data records the commit and the checksum of each file.
    #[command(
        after_help = "Examples:\n  medtune data get vqa_rad\n  medtune data get slake --revision main --out data/slake\n  medtune data get owner/name"
    )]
    Get(GetArgs),
}

/// What `data get` needs.
#[derive(Debug, Clone, Args)]
pub struct GetArgs {
    /// Name of a reader (`medtune datasets`), or a data set repository as owner/name
    pub name: String,
    /// Branch, tag or commit
    #[arg(long, value_name = "REVISION", default_value = "main")]
    pub revision: String,
    /// Folder for the files [default: data/<name>]
    #[arg(long, short, value_name = "DIR")]
    pub out: Option<PathBuf>,
}

/// What `data review` needs.
#[derive(Debug, Clone, Args)]
pub struct ReviewArgs {
    /// Run directory to draw from
    #[arg(required_unless_present = "read", conflicts_with = "read")]
    pub run: Option<PathBuf>,
    /// Rows to draw; a fifth of them are rejected ones
    #[arg(long, value_name = "N", default_value_t = 200)]
    pub n: usize,
    /// Folder for the page
    #[arg(long, short, value_name = "DIR", default_value = "review")]
    pub out: PathBuf,
    /// Seed of the draw
    #[arg(long, value_name = "N", default_value_t = 42)]
    pub seed: u64,
    /// File of marks that the page saved; repeat for several reviewers
    #[arg(long, value_name = "FILE")]
    pub read: Vec<PathBuf>,
}

/// What `data export` needs.
#[derive(Debug, Clone, Args)]
pub struct DataExportArgs {
    /// Run directory
    pub run: PathBuf,
    /// Folder to write; it must not exist yet, or be empty
    pub dir: PathBuf,
    /// Form of the rows
    #[arg(long, value_enum)]
    pub format: Format,
    /// Rows to train on: all, positive, negative, no-qc, a share of the images such as 25%, or several joined by +
    #[arg(long, value_name = "VIEW", default_value = "all")]
    pub view: View,
}

/// Ways to look at models.
#[derive(Debug, Subcommand)]
pub enum ModelsVerb {
    /// Family, types, files and tensors of a checkpoint, whether it would load, and the memory it needs
    ///
    /// Exit code 1 if it would not load.
    #[command(after_help = "Example:\n  medtune models inspect path/to/checkpoint --load")]
    Inspect(InspectArgs),
    /// Write a random checkpoint in the files, types and sizes of a release, to test loading, memory and speed
    ///
    /// Its answers mean nothing. Needs a few megabytes of memory and the disk space of the release; after an interrupt
    /// the same command continues.
    #[command(
        after_help = "Examples:\n  medtune models synth v1.5-7b synth/llava_med\n  medtune models synth internvl/tiny synth/tiny"
    )]
    Synth(SynthArgs),
}

/// Ways to look at recipes.
#[derive(Debug, Subcommand)]
pub enum RecipesVerb {
    /// Print the file of a recipe
    Show {
        /// Its name
        name: String,
    },
}
