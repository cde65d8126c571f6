//! Qwen-VL's resampler: learned queries attend once to all patches, so that every image gives the same number of
//! features (`Resampler` in `visual.py` of Qwen/Qwen-VL-Chat).

use burn::{
    module::{Module, Param},
    nn::Linear,
    tensor::{Device, Tensor, TensorData, module::linear, s},
};

use super::{
    attention::attend,
    cast,
    interpolate::bicubic_table,
    linear::{linear_forward, linear_module},
    norm::LayerNorm,
    parameter,
};

/// `torch.nn.MultiheadAttention`: rows of `in_proj_weight` are queries, keys, values, each of all heads.
#[derive(Module, Debug)]
pub struct MultiheadAttention {
    /// `[3 * width, width]`
    pub in_proj_weight: Param<Tensor<2>>,
    /// `[3 * width]`
    pub in_proj_bias: Param<Tensor<1>>,
    /// Output.
    pub out_proj: Linear,
    /// Heads.
    pub num_heads: usize,
}

impl MultiheadAttention {
    fn new(width: usize, num_heads: usize, device: &Device) -> Self {
        Self {
            in_proj_weight: parameter([3 * width, width], 0.0, device),
            in_proj_bias: parameter([3 * width], 0.0, device),
            out_proj: linear_module(width, width, true, device),
            num_heads,
        }
    }

    /// # Shapes
    /// `[rows, queries, width]`, `[rows, keys, width]` twice -> `[rows, queries, width]`
    #[must_use]
    pub fn forward(&self, q: Tensor<3>, k: Tensor<3>, v: Tensor<3>) -> Tensor<3> {
        let (weight, bias) = (self.in_proj_weight.val(), self.in_proj_bias.val());
        let heads = |x: Tensor<3>, part: usize| {
            let [rows, length, width] = x.dims();
            let range = part * width..(part + 1) * width;
            let weight = weight.clone().slice(s![range.clone(), ..]).transpose();
            let x = linear(x, weight, Some(bias.clone().slice(s![range])));
            x.reshape([rows, length, self.num_heads, width / self.num_heads])
        };
        let (q, k, v) = (heads(q, 0), heads(k, 1).swap_dims(1, 2), heads(v, 2).swap_dims(1, 2));
        linear_forward(&self.out_proj, attend(q, k, v, None))
    }
}

/// One cross-attention from learned queries to patches.
#[derive(Module, Debug)]
pub struct Resampler {
    /// `[queries, width]`, positions of the queries' square grid; a constant table in the original, but stored.
    pub pos_embed: Param<Tensor<2>>,
    /// `[queries, width]`
    pub query: Param<Tensor<2>>,
    /// Patches to the resampler's width; absent when they have it already.
    pub kv_proj: Option<Linear>,
    /// Attention.
    pub attn: MultiheadAttention,
    /// Norm of the queries.
    pub ln_q: LayerNorm,
    /// Norm of the projected patches.
    pub ln_kv: LayerNorm,
}

impl Resampler {
    /// `queries` is a square number. Without memory until loaded.
    #[must_use]
    pub fn new(queries: usize, width: usize, kv_width: usize, num_heads: usize, eps: f64, device: &Device) -> Self {
        Self {
            pos_embed: parameter([queries, width], 0.0, device),
            query: parameter([queries, width], 0.0, device),
            kv_proj: (kv_width != width).then(|| linear_module(kv_width, width, false, device)),
            attn: MultiheadAttention::new(width, num_heads, device),
            ln_q: LayerNorm::new(width, eps, device),
            ln_kv: LayerNorm::new(width, eps, device),
        }
    }

    /// Keys and values before positions are added.
    ///
    /// # Shapes
    /// `[tiles, patches, kv_width]` -> `[tiles, patches, width]`
    #[must_use]
    pub fn keys(&self, patches: Tensor<3>) -> Tensor<3> {
        self.ln_kv.forward(match &self.kv_proj {
            Some(kv_proj) => linear_forward(kv_proj, patches),
            None => patches,
        })
    }

    /// The number of patches is a square. Values carry no positions.
    ///
    /// # Shapes
    /// `[tiles, patches, kv_width]` -> `[tiles, queries, width]`
    #[must_use]
    pub fn forward(&self, patches: Tensor<3>) -> Tensor<3> {
        let [tiles, count, _] = patches.dims();
        let values = self.keys(patches);
        let positions = cast(self.pos_embed.val(), values.dtype());
        let keys = values.clone() + bicubic_table(positions.clone(), count.isqrt()).unsqueeze();
        let queries = self.ln_q.forward(self.query.val()) + positions;
        let [length, width] = queries.dims();
        let queries = queries.reshape([1, length, width]).expand([tiles, length, width]);
        self.attn.forward(queries, keys, values)
    }
}

/// Sine-cosine positions of a square grid: the first half of the channels is the column, the second the row; in each
/// half the sines of all frequencies, then the cosines.
///
/// # Shapes
/// `[side * side, width]`; `width` is a multiple of 4
#[must_use]
pub fn sincos_table(width: usize, side: usize, device: &Device) -> Tensor<2> {
    let frequencies: Vec<f64> = (0..width / 4).map(|k| 10000f64.powf(-(k as f64) / (width as f64 / 4.0))).collect();
    let mut values = Vec::with_capacity(side * side * width);
    for cell in 0..side * side {
        for position in [cell % side, cell / side] {
            values.extend(frequencies.iter().map(|f| (position as f64 * f).sin() as f32));
            values.extend(frequencies.iter().map(|f| (position as f64 * f).cos() as f32));
        }
    }
    Tensor::from_data(TensorData::new(values, [side * side, width]), device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_counts_columns_before_rows() {
        let table: Vec<f32> = sincos_table(8, 3, &Device::flex()).into_data().try_to_vec().unwrap();
        let (column, row) = (5 % 3, 5 / 3);
        let cell = &table[5 * 8..6 * 8];
        assert!((cell[0] - (column as f32).sin()).abs() < 1e-6 && (cell[2] - (column as f32).cos()).abs() < 1e-6);
        assert!((cell[4] - (row as f32).sin()).abs() < 1e-6 && (cell[5] - (0.01 * row as f32).sin()).abs() < 1e-6);
    }

    #[test]
    fn features_do_not_depend_on_the_other_tiles() {
        let device = Device::flex();
        let resampler = crate::weights::init_random(Resampler::new(4, 16, 8, 2, 1e-6, &device), 1, 0.3);
        let tile = |seed: f32| {
            let values: Vec<f32> = (0..9 * 8).map(|i| (i as f32 * 0.37 + seed).sin()).collect();
            Tensor::<3>::from_data(TensorData::new(values, [1, 9, 8]), &device)
        };
        let alone = resampler.forward(tile(0.0));
        let both = resampler.forward(Tensor::cat(vec![tile(0.0), tile(2.0)], 0));
        assert_eq!(both.dims(), [2, 4, 16]);
        let difference = (both.clone().narrow(0, 0, 1) - alone.clone()).abs().max().into_scalar::<f32>();
        let other = (both.narrow(0, 1, 1) - alone).abs().max().into_scalar::<f32>();
        assert!(difference < 1e-6 && other > 1e-3, "{difference} {other}");
    }
}
