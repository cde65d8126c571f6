//! Functions that are compiled for AVX2.

/// Defines functions whose bodies are compiled for AVX2, of which the first argument, a [`pulp::x86::V3`], is the proof.
///
/// A closure given to `V3::vectorize` would do the same only as long as the optimiser takes it for small enough to merge
/// it into the place where the instructions are known; if not, each vector instruction becomes a call.
macro_rules! vectorized {
    ($($(#[$attribute:meta])* $visible:vis fn $name:ident<$($life:lifetime),*>(
        $simd:ident: V3, $($argument:ident: $type:ty),* $(,)?
    ) -> $output:ty $body:block)*) => {$(
        $(#[$attribute])*
        $visible fn $name<$($life),*>($simd: V3, $($argument: $type),*) -> $output {
            struct Call<$($life),*> {
                $simd: V3,
                $($argument: $type),*
            }

            impl<$($life),*> pulp::NullaryFnOnce for Call<$($life),*> {
                type Output = $output;

                #[inline(always)]
                fn call(self) -> $output {
                    let Self { $simd, $($argument),* } = self;
                    $body
                }
            }

            $simd.vectorize(Call { $simd, $($argument),* })
        }
    )*};
}
pub(super) use vectorized;
