"""One image file of CAMUS, NIfTI or MHD -> uint8 [T, H, W], or one sentence on why not; and the way back to NIfTI."""

import gzip
import io
import math
import re

import numpy as np

LABELS = {0: "background", 1: "LV cavity", 2: "LV myocardium", 3: "left atrium"}
UNLABELLED = 255  # a pixel or frame that has no reference mask
AGAIN = "download it again, or delete it to go on without it"


class CamusError(ValueError):
    """One sentence: which file, what is wrong, the remedy. `file` is its folder and name."""

    file = ""


def short(path):
    return f"{path.parent.name}/{path.name}"


def refuse(path, what, remedy=AGAIN) -> CamusError:
    error = CamusError(f"{short(path)} {what}: {remedy}.")
    error.file = short(path)
    return error


def content(path) -> bytes:
    """All of a file.

    Raises:
        CamusError: it cannot be opened: no permission, a folder, a link to nowhere.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        remedy = "make it a readable file, or delete it to go on without it"
        raise refuse(path, f"cannot be opened ({error.strerror})", remedy) from None


def raw_of(path):
    """The data file that an .mhd header names; None for other formats and for data inside the header file."""
    try:
        head = path.read_bytes()[:4096].decode("latin-1") if path.suffix == ".mhd" else ""
    except OSError:  # `read_image` will say so
        head = ""
    name = re.search(r"^ElementDataFile *= *(\S.*?)\s*$", head, re.MULTILINE)
    return None if name is None or name[1] == "LOCAL" else path.parent / name[1]


def read_image(path):
    """The pixels, uint8 [T, H, W] with the apex up and left on the left, and their spacing (y, x) in mm.

    Raises:
        CamusError: damaged, not an image or a sequence, no usable spacing, not whole numbers of 0..255.
    """
    return read_grid(path)[:2]


def read_grid(path):
    """As `read_image`, and where x and y run: "LP" to the left and to the back, "" where the file does not tell."""
    try:
        array, spacing, axes = (_load_mhd if path.suffix == ".mhd" else _load_nifti)(path)
    except Exception as error:  # whatever a parser stumbles on in a damaged file
        why = " ".join(str(error).split())[:160] or type(error).__name__
        raise refuse(path, f"is cut short or damaged ({why})") from None
    if array.ndim != 3 or array.size == 0:
        raise refuse(path, f"has shape {array.shape}, which is neither an image nor a sequence")
    if spacing is None:
        raise refuse(path, "has no line ElementSpacing", "write its mm there, or delete it to go on without it")
    if not all(math.isfinite(mm) and mm > 0 for mm in spacing):
        raise refuse(path, f"has a pixel spacing of {spacing} mm")
    kind = array.dtype.kind
    with np.errstate(invalid="ignore"):
        whole = kind in "ui" or (kind == "f" and (array == np.rint(array)).all())  # NaN does not equal itself
    if not whole or array.min() < 0 or array.max() > 255:
        raise refuse(path, "holds values other than the whole numbers 0..255")
    return array.astype(np.uint8), spacing, axes


def _axes(affine):
    from nibabel import aff2axcodes

    return "".join(code or "?" for code in aff2axcodes(affine)[:2])


def _load_nifti(path):
    import nibabel

    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    image = nibabel.Nifti1Image.from_bytes(data)
    if math.prod(image.shape) * image.get_data_dtype().itemsize > len(data):
        raise ValueError(f"{len(data)} bytes for {image.shape} pixels")
    array = np.asanyarray(image.dataobj).T  # (x, y[, t]) on disk, so the transpose stands upright
    array = array.reshape(-1, *array.shape[-2:]) if math.prod(array.shape[:-3]) == 1 else array
    header = nibabel.Nifti1Header.from_fileobj(io.BytesIO(data), check=False)  # checked, 0 mm turns into 1 mm
    unit = {1: 1000, 3: 0.001}.get(int(header["xyzt_units"]) & 7, 1)  # m, µm -> mm; not told: mm
    told = image.header["sform_code"] or image.header["qform_code"]
    return (array, tuple(round(float(size) * unit, 6) for size in header.get_zooms()[1::-1]),
            _axes(image.affine) if told else "")


def _load_mhd(path):
    import SimpleITK

    try:
        image = SimpleITK.ReadImage(str(path))
    except RuntimeError:  # its text holds memory addresses
        raise ValueError("header and data do not go together") from None
    array = SimpleITK.GetArrayFromImage(image)  # (t, y, x) already
    size, affine = image.GetDimension(), np.eye(4)
    affine[:size, :size] = np.reshape(image.GetDirection(), (size, size))
    told = re.search(rb"^Element(Spacing|Size)\s*[=:]", path.read_bytes()[:4096], re.MULTILINE)  # if not, ITK says 1 mm
    return (array.reshape(-1, *array.shape[-2:]), tuple(image.GetSpacing()[1::-1]) if told else None,
            _axes(np.diag([-1, -1, 1, 1]) @ affine))  # ITK counts to the left and to the back, NIfTI to the other sides


def read_onto(path, shape, spacing, axes) -> np.ndarray:
    """An image that lies on frames of this shape, spacing and axes (see `read_grid`): uint8 [T, H, W].

    Raises:
        CamusError: see `read_image`; another shape; a spacing more than 1 % off; axes that run elsewhere.
    """
    array, own_spacing, own_axes = read_grid(path)
    if array.shape != shape:
        raise refuse(path, f"has shape {array.shape} where its frames have {shape}")
    if not np.allclose(own_spacing, spacing, rtol=0.01, atol=0):
        raise refuse(path, f"has a pixel spacing of {own_spacing} mm (y, x) where its frames have {spacing}")
    if axes and own_axes and axes != own_axes:
        raise refuse(path, f"has axes that run {own_axes} (x, y) where those of its frames run {axes}")
    return array


def read_mask(path, shape, spacing, axes) -> np.ndarray:
    """A reference mask, uint8 [T, H, W], that lies on its frames and has labels 0..3.

    Raises:
        CamusError: see `read_onto`; unknown labels.
    """
    mask = read_onto(path, shape, spacing, axes)
    if mask.max() > max(LABELS):
        raise refuse(path, f"holds the label {mask.max()}, and CAMUS ends at {max(LABELS)}")
    return mask


def save_nifti(path, volume, spacing, dtype=np.float32):
    """uint8 [T, H, W] or [H, W] -> NIfTI as CAMUS has it: (W, H[, T]), affine diag(-x, -y, 1).

    Args:
        spacing: (y, x) in mm.
        dtype: of the voxels on disk; CAMUS itself has float32, also for masks.
    """
    import nibabel

    y, x = map(float, spacing)
    image = nibabel.Nifti1Image(np.asfortranarray(volume.T, dtype), None)
    image.header.set_zooms((x, y, 1.0)[:volume.ndim])
    image.header.set_xyzt_units("mm")
    image.set_sform(np.diag([-x, -y, 1, 1]), code=1)
    image.set_qform(np.diag([-x, -y, 1, 1]), code=1)
    nibabel.save(image, path)
