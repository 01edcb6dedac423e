//! Elements of four float dtypes, read and written block by block in the dtype a kernel computes in.

use std::marker::PhantomData;
use std::ops::{Add, Div, Mul, Sub};

use half::{bf16, f16};

/// A dtype that kernels compute in: f32, or f64 where an input is f64.
pub trait Real:
    Copy
    + Send
    + Sync
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + 'static
{
    /// Zero.
    const ZERO: Self;
    /// The dtype as stored.
    const KIND: ElementKind;
    /// Rounds from f64.
    fn from_f64(value: f64) -> Self;
    /// Widens to f64.
    fn to_f64(self) -> f64;
    /// Converts from f32.
    fn from_f32(value: f32) -> Self;
    /// Converts to f32.
    fn to_f32(self) -> f32;
    /// The square root.
    fn sqrt(self) -> Self;
    /// The elements themselves, where they already are of this dtype.
    fn borrow<'a>(elements: Elements<'a>) -> Option<&'a [Self]>;
    /// The memory itself, where it already is of this dtype.
    fn borrow_mut<'a>(block: &'a mut BlockMut<'_>) -> Option<&'a mut [Self]>;
}

macro_rules! real {
    ($float:ty, $variant:ident) => {
        impl Real for $float {
            const ZERO: Self = 0.0;
            const KIND: ElementKind = ElementKind::$variant;
            #[inline(always)]
            fn from_f64(value: f64) -> Self {
                value as Self
            }
            #[inline(always)]
            fn to_f64(self) -> f64 {
                self as f64
            }
            #[inline(always)]
            fn from_f32(value: f32) -> Self {
                value as Self
            }
            #[inline(always)]
            fn to_f32(self) -> f32 {
                self as f32
            }
            #[inline(always)]
            fn sqrt(self) -> Self {
                <$float>::sqrt(self)
            }
            #[inline(always)]
            fn borrow<'a>(elements: Elements<'a>) -> Option<&'a [Self]> {
                match elements {
                    Elements::$variant(values) => Some(values),
                    _ => None,
                }
            }
            #[inline(always)]
            fn borrow_mut<'a>(block: &'a mut BlockMut<'_>) -> Option<&'a mut [Self]> {
                match block {
                    BlockMut::$variant(values) => Some(values),
                    _ => None,
                }
            }
        }
    };
}
real!(f32, F32);
real!(f64, F64);

/// The dtype of stored elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ElementKind {
    /// float32
    F32,
    /// float64
    F64,
    /// bfloat16
    BF16,
    /// float16
    F16,
}

impl ElementKind {
    const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F64 => 8,
            Self::BF16 | Self::F16 => 2,
        }
    }
}

/// Elements to read.
#[derive(Clone, Copy, Debug)]
pub enum Elements<'a> {
    /// float32
    F32(&'a [f32]),
    /// float64
    F64(&'a [f64]),
    /// bfloat16
    BF16(&'a [bf16]),
    /// float16
    F16(&'a [f16]),
}

impl<'a> Elements<'a> {
    /// How many there are.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::F64(values) => values.len(),
            Self::BF16(values) => values.len(),
            Self::F16(values) => values.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// `len` elements from `start`.
    #[inline(always)]
    pub fn slice(&self, start: usize, len: usize) -> Self {
        let range = start..start + len;
        match self {
            Self::F32(values) => Self::F32(&values[range]),
            Self::F64(values) => Self::F64(&values[range]),
            Self::BF16(values) => Self::BF16(&values[range]),
            Self::F16(values) => Self::F16(&values[range]),
        }
    }

    /// `len` elements from `start` as `T`: borrowed where they are of that dtype, else converted into `scratch`.
    #[inline(always)]
    pub fn load<'s, T: Real>(&self, start: usize, len: usize, scratch: &'s mut [T]) -> &'s [T]
    where
        'a: 's,
    {
        let block = self.slice(start, len);
        if let Some(values) = T::borrow(block) {
            return values;
        }
        let scratch = &mut scratch[..len];
        block.copy_into(scratch);
        scratch
    }

    /// Converts every `stride`-th element from `start` into `target`, as many as that has.
    #[inline(always)]
    pub fn gather<T: Real>(&self, start: usize, stride: usize, target: &mut [T]) {
        match *self {
            Self::F32(values) => pick(values, start, stride, target, |value| T::from_f32(value)),
            Self::F64(values) => pick(values, start, stride, target, |value| T::from_f64(value)),
            Self::BF16(values) => pick(values, start, stride, target, |value| T::from_f32(bf16_to_f32(value))),
            Self::F16(values) => pick(values, start, stride, target, |value| T::from_f32(f16_to_f32(value))),
        }
    }

    /// Converts all elements into `target`, which has as many.
    #[inline(always)]
    pub fn copy_into<T: Real>(&self, target: &mut [T]) {
        match *self {
            Self::F32(values) => convert(values, target, |value| T::from_f32(value)),
            Self::F64(values) => convert(values, target, |value| T::from_f64(value)),
            Self::BF16(values) => convert(values, target, |value| T::from_f32(bf16_to_f32(value))),
            Self::F16(values) => convert(values, target, |value| T::from_f32(f16_to_f32(value))),
        }
    }
}

#[inline(always)]
fn take<S: Copy, T>(block: &mut [S], zero: S, values: &mut [T], map: impl Fn(S) -> T) {
    convert(block, values, map);
    block.fill(zero);
}

#[inline(always)]
fn pick<S: Copy, T>(source: &[S], start: usize, stride: usize, target: &mut [T], map: impl Fn(S) -> T) {
    for (index, target) in target.iter_mut().enumerate() {
        *target = map(source[start + index * stride]);
    }
}

#[inline(always)]
fn convert<S: Copy, T>(source: &[S], target: &mut [T], map: impl Fn(S) -> T) {
    for (target, &source) in target.iter_mut().zip(source) {
        *target = map(source);
    }
}

/// Elements to write, shared by threads that write disjoint blocks.
#[derive(Debug)]
pub struct ElementsMut<'a> {
    kind: ElementKind,
    data: *mut u8,
    len: usize,
    memory: PhantomData<&'a mut [u8]>,
}

// SAFETY: the only access is `block`, whose contract is that blocks in use at one time are disjoint.
unsafe impl Send for ElementsMut<'_> {}
// SAFETY: as above.
unsafe impl Sync for ElementsMut<'_> {}

impl<'a> ElementsMut<'a> {
    /// A view of `len` elements at `data`.
    ///
    /// # Safety
    /// `data` points at `len` initialized elements of `kind`, aligned, alive and unshared for `'a`.
    pub unsafe fn new(kind: ElementKind, data: *mut u8, len: usize) -> Self {
        Self { kind, data, len, memory: PhantomData }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The values, where they are of type `T`.
    pub fn typed<T: Real>(self) -> Option<DisjointMut<'a, T>> {
        (self.kind == T::KIND).then_some(DisjointMut { data: self.data.cast(), len: self.len, memory: PhantomData })
    }

    /// `len` elements from `start`.
    ///
    /// # Safety
    /// No two blocks alive at one time overlap.
    #[inline(always)]
    pub unsafe fn block<'s>(&'s self, start: usize, len: usize) -> BlockMut<'s> {
        assert!(start + len <= self.len, "block {start}+{len} of {} elements", self.len);
        if len == 0 {
            return BlockMut::F32(&mut []);
        }
        let data = self.data.add(start * self.kind.size());
        match self.kind {
            ElementKind::F32 => BlockMut::F32(std::slice::from_raw_parts_mut(data.cast(), len)),
            ElementKind::F64 => BlockMut::F64(std::slice::from_raw_parts_mut(data.cast(), len)),
            ElementKind::BF16 => BlockMut::BF16(std::slice::from_raw_parts_mut(data.cast(), len)),
            ElementKind::F16 => BlockMut::F16(std::slice::from_raw_parts_mut(data.cast(), len)),
        }
    }
}

/// Values of one type to write, shared by threads that write disjoint ranges.
#[derive(Debug)]
pub struct DisjointMut<'a, T> {
    data: *mut T,
    len: usize,
    memory: PhantomData<&'a mut [T]>,
}

// SAFETY: the only access is `range`, whose contract is that ranges in use at one time are disjoint.
unsafe impl<T: Send> Send for DisjointMut<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for DisjointMut<'_, T> {}

impl<'a, T> DisjointMut<'a, T> {
    /// A view of `values`.
    pub fn new(values: &'a mut [T]) -> Self {
        Self { data: values.as_mut_ptr(), len: values.len(), memory: PhantomData }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// `len` values from `start`.
    ///
    /// # Safety
    /// No two ranges alive at one time overlap.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn range(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start + len <= self.len, "range {start}+{len} of {} values", self.len);
        std::slice::from_raw_parts_mut(self.data.add(start), len)
    }
}

/// A block of elements to write.
#[derive(Debug)]
pub enum BlockMut<'a> {
    /// float32
    F32(&'a mut [f32]),
    /// float64
    F64(&'a mut [f64]),
    /// bfloat16
    BF16(&'a mut [bf16]),
    /// float16
    F16(&'a mut [f16]),
}

impl BlockMut<'_> {
    /// Lets `compute` write the block as `T`: directly where it is of that dtype, else through `scratch`.
    #[inline(always)]
    pub fn fill<T: Real, R>(mut self, len: usize, scratch: &mut [T], compute: impl FnOnce(&mut [T]) -> R) -> R {
        if let Some(values) = T::borrow_mut(&mut self) {
            return compute(values);
        }
        let scratch = &mut scratch[..len];
        let result = compute(scratch);
        self.store(scratch);
        result
    }

    /// Moves the block into `values` and leaves zeros.
    #[inline(always)]
    pub fn take<T: Real>(self, values: &mut [T]) {
        match self {
            Self::F32(block) => take(block, 0.0, values, |value| T::from_f32(value)),
            Self::F64(block) => take(block, 0.0, values, |value| T::from_f64(value)),
            Self::BF16(block) => take(block, bf16::ZERO, values, |value| T::from_f32(bf16_to_f32(value))),
            Self::F16(block) => take(block, f16::ZERO, values, |value| T::from_f32(f16_to_f32(value))),
        }
    }

    /// Writes `values`, rounded to the block's dtype.
    #[inline(always)]
    pub fn store<T: Real>(self, values: &[T]) {
        match self {
            Self::F32(target) => convert(values, target, |value| value.to_f32()),
            Self::F64(target) => convert(values, target, |value| value.to_f64()),
            Self::BF16(target) => convert(values, target, |value| f32_to_bf16(value.to_f32())),
            Self::F16(target) => convert(values, target, |value| f32_to_f16(value.to_f32())),
        }
    }
}

// The conversions of `half` are scalar calls; these are straight-line integer code that vectorizes.

#[inline(always)]
fn bf16_to_f32(value: bf16) -> f32 {
    f32::from_bits(u32::from(value.to_bits()) << 16)
}

#[inline(always)]
fn f32_to_bf16(value: f32) -> bf16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
    let kept = if value.is_nan() { bits | 0x0040_0000 } else { rounded };
    bf16::from_bits((kept >> 16) as u16)
}

#[inline(always)]
fn f16_to_f32(value: f16) -> f32 {
    const EXPONENT_SHIFT: f32 = f32::from_bits((127 + 112) << 23);
    let bits = u32::from(value.to_bits());
    let magnitude = bits & 0x7fff;
    let finite = (f32::from_bits(magnitude << 13) * EXPONENT_SHIFT).to_bits();
    let special = (magnitude << 13) | 0x7f80_0000;
    let kept = if magnitude >= 0x7c00 { special } else { finite };
    f32::from_bits(kept | ((bits & 0x8000) << 16))
}

#[inline(always)]
fn f32_to_f16(value: f32) -> f16 {
    const OVERFLOW: u32 = (127 + 16) << 23;
    const SMALLEST_NORMAL: u32 = (127 - 14) << 23;
    // Adding this aligns a subnormal's mantissa so that the addition itself rounds to nearest even.
    const SUBNORMAL: u32 = (127 - 1) << 23;
    let bits = value.to_bits();
    let magnitude = bits & 0x7fff_ffff;
    let special = if magnitude > 0x7f80_0000 { 0x7e00 } else { 0x7c00 };
    let subnormal = (f32::from_bits(magnitude) + f32::from_bits(SUBNORMAL)).to_bits().wrapping_sub(SUBNORMAL);
    let odd = (magnitude >> 13) & 1;
    let normal = magnitude.wrapping_sub((127 - 15) << 23).wrapping_add(0xfff + odd) >> 13;
    let kept = if magnitude >= OVERFLOW {
        special
    } else if magnitude < SMALLEST_NORMAL {
        subnormal
    } else {
        normal
    };
    f16::from_bits((kept | ((bits >> 16) & 0x8000)) as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_widens_exactly() {
        for bits in 0..=u16::MAX {
            let (ours, theirs) = (f16_to_f32(f16::from_bits(bits)), f16::from_bits(bits).to_f32());
            assert!(ours.to_bits() == theirs.to_bits() || (ours.is_nan() && theirs.is_nan()), "f16 {bits:#x}");
            let (ours, theirs) = (bf16_to_f32(bf16::from_bits(bits)), bf16::from_bits(bits).to_f32());
            assert!(ours.to_bits() == theirs.to_bits() || (ours.is_nan() && theirs.is_nan()), "bf16 {bits:#x}");
        }
    }

    #[test]
    fn narrowing_rounds_to_nearest_even() {
        // A step coprime to 2^32 visits every exponent, many mantissas, ties and both signs.
        let mut bits = 0u32;
        for _ in 0..2_000_000 {
            let value = f32::from_bits(bits);
            let (ours, theirs) = (f32_to_f16(value), f16::from_f32(value));
            assert!(ours == theirs || (ours.is_nan() && theirs.is_nan()), "f16 of {bits:#x}");
            let (ours, theirs) = (f32_to_bf16(value), bf16::from_f32(value));
            assert!(ours == theirs || (ours.is_nan() && theirs.is_nan()), "bf16 of {bits:#x}");
            bits = bits.wrapping_add(0x0001_0001 * 33 + 0x1000);
        }
        for tie in [1.000_488_3_f32, 1.001_464_8, 65_504.0, 65_519.0, 65_520.0, 5.96e-8, 2.98e-8, 6.1e-5, -0.0] {
            assert_eq!(f32_to_f16(tie).to_bits(), f16::from_f32(tie).to_bits(), "{tie}");
        }
    }
}
