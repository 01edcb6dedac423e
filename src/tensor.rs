//! Checked views of libtorch tensors: what the kernels may assume about dtype, device, layout and shape.

use std::ffi::CStr;

use half::{bf16, f16};
use tch::{Device, Kind, Tensor};
use torch_sys::c_generated::atg_is_neg;
use torch_sys::{at_data_ptr, at_device, at_dim, at_shape, at_stride, get_and_reset_last_err, C_tensor};

use crate::cpu::{Elements, ElementsMut};
use crate::error::{CatError, Result, TorchContext};

extern "C" {
    // Of libtorch's C interface, which does not change.
    fn aoti_torch_get_storage_size(tensor: *mut C_tensor, bytes: *mut i64) -> i32;
    fn aoti_torch_get_storage_offset(tensor: *mut C_tensor, elements: *mut i64) -> i32;
}

/// The float dtypes that every operation handles.
pub const FLOAT_DTYPES: &str = "float32, float64, bfloat16 or float16";

/// Takes the pending libtorch error; the calls below bypass tch's wrappers because those panic.
fn take_torch_error(op: &'static str) -> Result<()> {
    // SAFETY: libtorch's shim returns null or a malloc'ed C string that becomes ours.
    unsafe {
        let message = get_and_reset_last_err();
        if message.is_null() {
            return Ok(());
        }
        let text = CStr::from_ptr(message).to_string_lossy().into_owned();
        libc::free(message.cast());
        Err(CatError::torch_message(op, &text))
    }
}

/// PyTorch's name of a dtype.
pub fn dtype_name(kind: Kind) -> String {
    match kind {
        Kind::Float => "float32".into(),
        Kind::Double => "float64".into(),
        Kind::BFloat16 => "bfloat16".into(),
        Kind::Half => "float16".into(),
        Kind::Int64 => "int64".into(),
        Kind::Int => "int32".into(),
        Kind::Bool => "bool".into(),
        other => format!("{other:?}").to_lowercase(),
    }
}

/// Where the tensor is; `None` on a device that is neither the CPU nor CUDA.
fn device(op: &'static str, tensor: &Tensor) -> Result<Option<Device>> {
    // SAFETY: the pointer is a live tensor owned by `tensor`.
    let index = unsafe { at_device(tensor.as_ptr().cast_mut()) };
    take_torch_error(op)?;
    Ok(match index {
        -1 => Some(Device::Cpu),
        _ => usize::try_from(index).ok().map(Device::Cuda),
    })
}

/// The CPU or the CUDA device that the tensor is on: the other tensors of the call must be there too.
pub fn device_of(op: &'static str, argument: &'static str, tensor: &Tensor) -> Result<Device> {
    device(op, tensor)?.ok_or_else(|| CatError::Device {
        op,
        argument,
        expected: "the CPU or on CUDA".into(),
        got: device_name(None),
    })
}

/// Whether the tensor is on the CPU.
pub fn is_on_cpu(tensor: &Tensor) -> bool {
    device("", tensor).is_ok_and(|device| device == Some(Device::Cpu))
}

fn device_name(device: Option<Device>) -> String {
    match device {
        Some(Device::Cpu) => "the CPU".into(),
        Some(Device::Cuda(index)) => format!("cuda:{index}"),
        _ => "another device".into(),
    }
}

/// The number of elements from a tensor's first to its last in memory; `None` where libtorch does not tell its sizes
/// and strides: compressed sparse and nested tensors have none.
fn extent(tensor: &Tensor) -> Option<i64> {
    let pointer = tensor.as_ptr().cast_mut();
    // SAFETY: the pointer is a live tensor, and the buffers hold one number a dimension.
    unsafe {
        let dim = at_dim(pointer);
        take_torch_error("").ok()?;
        let (mut sizes, mut strides) = (vec![0i64; dim], vec![0i64; dim]);
        at_shape(pointer, sizes.as_mut_ptr());
        take_torch_error("").ok()?;
        at_stride(pointer, strides.as_mut_ptr());
        take_torch_error("").ok()?;
        let last = sizes
            .iter()
            .zip(strides)
            .fold(0i64, |last, (size, stride)| last.saturating_add((size - 1).saturating_mul(stride)));
        Some(if sizes.contains(&0) { 0 } else { last.saturating_add(1) })
    }
}

/// Checks that `tensor` is a dense tensor on the device `on` whose elements are in its memory. What takes an address
/// asks this first, of every tensor that comes from outside; before, nothing but its device may be asked.
pub fn check_dense(op: &'static str, argument: &'static str, tensor: &Tensor, on: Device) -> Result<()> {
    let found = device(op, tensor)?;
    if found != Some(on) {
        return Err(CatError::Device { op, argument, expected: device_name(Some(on)), got: device_name(found) });
    }
    let layout = |expected, got: String| Err(CatError::Layout { op, argument, expected, got });
    let opaque = tensor.is_sparse() || tensor.is_mkldnn();
    let Some(extent) = extent(tensor).filter(|_| !opaque) else {
        return layout("a dense tensor", "a sparse or opaque one".into());
    };
    let pointer = tensor.as_ptr().cast_mut();
    // SAFETY: the pointer is a live tensor.
    let negated = unsafe { atg_is_neg(pointer) };
    take_torch_error(op)?;
    if negated != 0 {
        return layout("a plain tensor", "a lazily negated view (call .resolve_neg())".into());
    }
    // SAFETY: as above; what the wrappers of function transforms have in place of memory is an error.
    let data = unsafe { at_data_ptr(pointer) };
    if take_torch_error(op).is_err() {
        return layout("a tensor with memory of its own", "a wrapper around one (of torch.func?)".into());
    }
    if extent == 0 {
        return Ok(());
    }
    let (mut bytes, mut offset) = (0, 0);
    // SAFETY: as above; libtorch's handle of a tensor is a pointer to it.
    let failed = unsafe {
        aoti_torch_get_storage_size(pointer, &mut bytes) | aoti_torch_get_storage_offset(pointer, &mut offset)
    };
    let size = kind_of(op, argument, tensor)?.elt_size_in_bytes();
    let end = offset.saturating_add(extent).saturating_mul(size as i64);
    if failed != 0 || data.is_null() || bytes < end {
        let got = format!("one that ends at byte {end} of a storage of {}", if data.is_null() { 0 } else { bytes });
        return layout("a tensor with memory for its elements", got);
    }
    if !(data as usize).is_multiple_of(size.max(1)) {
        return layout("a tensor aligned to its dtype", format!("one at an address that {size} does not divide"));
    }
    Ok(())
}

/// The tensor's dtype; tch has no names for those of raw bits and of parts of a byte.
pub fn kind_of(op: &'static str, argument: &'static str, tensor: &Tensor) -> Result<Kind> {
    let got = || "one of raw bits or parts of a byte".into();
    tensor.f_kind().map_err(|_| CatError::Dtype { op, argument, expected: "numbers of whole bytes", got: got() })
}

/// Checks that `tensor` is a dense tensor of a float dtype on the device `on`, and returns that dtype.
pub fn check_float(op: &'static str, argument: &'static str, tensor: &Tensor, on: Device) -> Result<Kind> {
    check_dense(op, argument, tensor, on)?;
    match kind_of(op, argument, tensor)? {
        kind @ (Kind::Float | Kind::Double | Kind::BFloat16 | Kind::Half) => Ok(kind),
        other => Err(CatError::Dtype { op, argument, expected: FLOAT_DTYPES, got: dtype_name(other) }),
    }
}

/// Checks that nothing is asked to flow into a tensor that the operation treats as a constant.
pub fn check_constant(op: &'static str, argument: &'static str, tensor: &Tensor) -> Result<()> {
    if tensor.requires_grad() {
        let expected = "a constant (no gradient flows into it)";
        return Err(CatError::value(op, argument, expected, "a tensor with requires_grad=True: detach it"));
    }
    Ok(())
}

/// Checks that `tensor` has exactly the shape `expected`.
pub fn check_shape(op: &'static str, argument: &'static str, tensor: &Tensor, expected: &[i64]) -> Result<()> {
    let got = tensor.size();
    if got != expected {
        return Err(CatError::shape(op, argument, format!("{expected:?}"), &got));
    }
    Ok(())
}

/// The tensor itself where it is contiguous, else a contiguous copy.
pub fn contiguous(op: &'static str, tensor: &Tensor) -> Result<Tensor> {
    if tensor.is_contiguous() {
        Ok(tensor.shallow_clone())
    } else {
        tensor.f_contiguous().during(op)
    }
}

/// Checks that the elements of `tensor` lie one after the other.
pub fn check_contiguous(op: &'static str, argument: &'static str, tensor: &Tensor) -> Result<()> {
    if tensor.is_contiguous() {
        return Ok(());
    }
    let got = format!("strides {:?}", tensor.stride());
    Err(CatError::Layout { op, argument, expected: "contiguous", got })
}

/// The address of the first element, on the tensor's device.
pub fn address(op: &'static str, tensor: &Tensor) -> Result<u64> {
    data_pointer(op, tensor).map(|pointer| pointer as u64)
}

/// As [`address`]; 0 where there is no tensor.
pub fn optional_address(op: &'static str, tensor: Option<&Tensor>) -> Result<u64> {
    tensor.map_or(Ok(0), |tensor| address(op, tensor))
}

fn data_pointer(op: &'static str, tensor: &Tensor) -> Result<*mut libc::c_void> {
    // SAFETY: the pointer is a live tensor owned by `tensor`.
    let data = unsafe { at_data_ptr(tensor.as_ptr().cast_mut()) };
    take_torch_error(op)?;
    if data.is_null() && tensor.numel() > 0 {
        // Arguments have memory, see `check_dense`; what libtorch makes has none in a mode that only looks at shapes.
        let expected = "a tensor with memory: call the operation outside of FakeTensorMode";
        return Err(CatError::Layout { op, argument: "result", expected, got: "one without".into() });
    }
    Ok(data)
}

/// A CPU tensor of those bytes. tch's own functions copy them without asking whether there is memory.
pub fn from_bytes(op: &'static str, data: &[u8], shape: &[i64], kind: Kind) -> Result<Tensor> {
    let tensor = Tensor::f_empty(shape, (kind, Device::Cpu)).during(op)?;
    let (place, expected) = (data_pointer(op, &tensor)?, tensor.numel() * kind.elt_size_in_bytes());
    if data.len() != expected {
        return Err(CatError::torch_message(
            op,
            &format!("expected {expected} bytes of a tensor, got {}", data.len()),
        ));
    }
    // SAFETY: the tensor is new and has memory for that many bytes.
    unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), place.cast(), data.len()) };
    Ok(tensor)
}

/// A CPU tensor of float64 values, [N].
pub fn from_values(op: &'static str, values: &[f64]) -> Result<Tensor> {
    let data: Vec<u8> = values.iter().flat_map(|value| value.to_ne_bytes()).collect();
    from_bytes(op, &data, &[values.len() as i64], Kind::Double)
}

/// The memory of a contiguous CPU tensor of any dtype.
pub fn bytes<'a>(op: &'static str, tensor: &'a Tensor) -> Result<&'a [u8]> {
    let size = tensor.f_kind().during(op)?.elt_size_in_bytes();
    let data = data_pointer(op, tensor)?;
    if tensor.numel() == 0 {
        return Ok(&[]);
    }
    // SAFETY: the callers checked device and contiguity; the memory is alive as long as `tensor` is borrowed.
    Ok(unsafe { std::slice::from_raw_parts(data.cast(), tensor.numel() * size) })
}

/// The elements of a contiguous CPU float tensor.
pub fn elements<'a>(op: &'static str, tensor: &'a Tensor) -> Result<Elements<'a>> {
    // SAFETY: the callers checked device and contiguity.
    unsafe { elements_at(op, tensor, tensor.numel()) }
}

/// The memory of a CPU float tensor of any strides, from its first to its last element.
pub fn strided_elements<'a>(op: &'static str, tensor: &'a Tensor) -> Result<Elements<'a>> {
    let len = match tensor.numel() {
        0 => 0,
        _ => 1 + tensor.size().iter().zip(tensor.stride()).map(|(size, stride)| (size - 1) * stride).sum::<i64>(),
    };
    // SAFETY: the callers checked the device; libtorch's strides are not negative, and its views stay within storage.
    unsafe { elements_at(op, tensor, len as usize) }
}

/// # Safety
/// `len` elements from the tensor's first lie in its memory, on the CPU.
unsafe fn elements_at<'a>(op: &'static str, tensor: &'a Tensor, len: usize) -> Result<Elements<'a>> {
    let kind = tensor.f_kind().during(op)?;
    let data = data_pointer(op, tensor)?;
    if len == 0 {
        return Ok(Elements::F32(&[]));
    }
    // SAFETY: the caller's contract; aligned as checked above, and alive as long as `tensor` is borrowed.
    Ok(unsafe {
        match kind {
            Kind::Double => Elements::F64(std::slice::from_raw_parts(data.cast(), len)),
            Kind::BFloat16 => Elements::BF16(std::slice::from_raw_parts(data.cast::<bf16>(), len)),
            Kind::Half => Elements::F16(std::slice::from_raw_parts(data.cast::<f16>(), len)),
            _ => Elements::F32(std::slice::from_raw_parts(data.cast(), len)),
        }
    })
}

/// The values of a contiguous CPU float tensor.
pub fn numbers(op: &'static str, tensor: &Tensor) -> Result<Vec<f64>> {
    let mut numbers = vec![0.0; tensor.numel()];
    elements(op, tensor)?.copy_into(&mut numbers);
    Ok(numbers)
}

/// The elements of a contiguous CPU float tensor, for writing.
///
/// The caller holds the only use of the tensor's memory for the lifetime of the view: outputs are freshly
/// allocated, and in-place operations document which arguments they write.
pub fn elements_mut<'a>(op: &'static str, tensor: &'a mut Tensor) -> Result<ElementsMut<'a>> {
    let kind = tensor.f_kind().during(op)?;
    let (data, len) = (data_pointer(op, tensor)?, tensor.numel());
    // SAFETY: as in `elements`; exclusive use is the caller's contract above.
    Ok(unsafe { ElementsMut::new(kind_to_element(kind), data.cast(), len) })
}

fn kind_to_element(kind: Kind) -> crate::cpu::ElementKind {
    use crate::cpu::ElementKind;
    match kind {
        Kind::Double => ElementKind::F64,
        Kind::BFloat16 => ElementKind::BF16,
        Kind::Half => ElementKind::F16,
        _ => ElementKind::F32,
    }
}
