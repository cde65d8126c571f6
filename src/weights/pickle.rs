//! The PyTorch files that `torch.save` makes of a dictionary of tensors: a zip archive with a pickle, which names the
//! tensors, and the bytes of each.

use std::io::{Seek, Write};

use burn::tensor::FloatDType;
use zip::{CompressionMethod, ZipWriter, result::ZipResult, write::SimpleFileOptions};

use super::save::Shard;

/// Folder inside the archive.
const ROOT: &str = "archive";

/// Opcodes of protocol 2.
mod op {
    pub(super) const PROTOCOL: &[u8] = &[0x80, 2];
    pub(super) const EMPTY_DICT: u8 = b'}';
    pub(super) const EMPTY_TUPLE: u8 = b')';
    pub(super) const MARK: u8 = b'(';
    pub(super) const TUPLE: u8 = b't';
    pub(super) const GLOBAL: u8 = b'c';
    pub(super) const TEXT: u8 = b'X';
    pub(super) const INT: u8 = b'J';
    pub(super) const PERSISTENT: u8 = b'Q';
    pub(super) const FALSE: u8 = 0x89;
    pub(super) const REDUCE: u8 = b'R';
    pub(super) const SET_ITEMS: u8 = b'u';
    pub(super) const STOP: u8 = b'.';
}

/// Writes an archive with the tensors of `shard`; `write` gives the bytes of the tensor at an index. `notes` are kept in
/// the archive's comment.
///
/// # Errors
/// The file cannot be written, or `write` fails.
pub(super) fn write<W: Write + Seek>(
    out: W,
    shard: &Shard,
    dtype: FloatDType,
    notes: &str,
    mut write: impl FnMut(usize, &mut dyn Write) -> std::io::Result<()>,
) -> ZipResult<W> {
    let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored).with_alignment(64);
    let mut archive = ZipWriter::new(out);
    archive.start_file(format!("{ROOT}/data.pkl"), options)?;
    archive.write_all(&pickle(shard, dtype))?;
    for index in 0..shard.tensors.len() {
        archive.start_file(format!("{ROOT}/data/{index}"), options)?;
        write(index, &mut archive)?;
    }
    archive.start_file(format!("{ROOT}/version"), options)?;
    archive.write_all(b"3\n")?;
    archive.set_comment(notes)?;
    archive.finish()
}

/// The dictionary: for each name a call that views a storage, which is named by its index.
fn pickle(shard: &Shard, dtype: FloatDType) -> Vec<u8> {
    let storage = match dtype {
        FloatDType::BF16 => "torch\nBFloat16Storage\n",
        FloatDType::F16 => "torch\nHalfStorage\n",
        _ => "torch\nFloatStorage\n",
    };
    let mut out = Pickle(op::PROTOCOL.to_vec());
    out.op(op::EMPTY_DICT).op(op::MARK);
    for (index, tensor) in shard.tensors.iter().enumerate() {
        let shape = tensor.checkpoint_shape();
        out.text(&tensor.name).global("torch._utils\n_rebuild_tensor_v2\n").op(op::MARK);
        out.op(op::MARK).text("storage").global(storage).text(&index.to_string()).text("cpu");
        out.int(tensor.num_elements()).op(op::TUPLE).op(op::PERSISTENT).int(0);
        out.tuple(&shape).tuple(&strides(&shape)).op(op::FALSE);
        out.global("collections\nOrderedDict\n").op(op::EMPTY_TUPLE).op(op::REDUCE).op(op::TUPLE).op(op::REDUCE);
    }
    out.op(op::SET_ITEMS).op(op::STOP);
    out.0
}

fn strides(shape: &[usize]) -> Vec<usize> {
    (0..shape.len()).map(|i| shape[i + 1..].iter().product()).collect()
}

struct Pickle(Vec<u8>);

impl Pickle {
    fn op(&mut self, code: u8) -> &mut Self {
        self.0.push(code);
        self
    }

    fn global(&mut self, name: &str) -> &mut Self {
        self.op(op::GLOBAL);
        self.0.extend(name.as_bytes());
        self
    }

    fn text(&mut self, text: &str) -> &mut Self {
        self.op(op::TEXT);
        self.0.extend((text.len() as u32).to_le_bytes());
        self.0.extend(text.as_bytes());
        self
    }

    /// A shard holds less than 2^31 values: larger tensors are not released.
    fn int(&mut self, value: usize) -> &mut Self {
        self.op(op::INT);
        self.0.extend((value as i32).to_le_bytes());
        self
    }

    fn tuple(&mut self, values: &[usize]) -> &mut Self {
        self.op(op::MARK);
        for value in values {
            self.int(*value);
        }
        self.op(op::TUPLE)
    }
}
