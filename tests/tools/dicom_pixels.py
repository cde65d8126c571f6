"""Pixels of DICOM files as pydicom sees them, for the comparison in tests/dicom.rs.

usage: dicom_pixels.py OUT FILE...

For each file it writes OUT/<n>.stored (64-bit floats, frame 0, after decompression) and OUT/<n>.shown (8-bit RGB, what
a viewer first shows), and OUT/index.json with what became of it. Needs pydicom, numpy, Pillow, pylibjpeg,
pylibjpeg-libjpeg and pylibjpeg-openjpeg.
"""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pydicom
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut

warnings.simplefilter("ignore")


def group_item(ds, name):
    """The item of a functional group of frame 0, per frame or shared."""
    for groups in ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"):
        if groups in ds and name in ds[groups].value[0]:
            return ds[groups].value[0][name].value[0]
    return None


def with_groups(ds):
    """Window and rescale of enhanced objects where pydicom looks for them."""
    for name, keys in (
        ("FrameVOILUTSequence", ("WindowCenter", "WindowWidth")),
        ("PixelValueTransformationSequence", ("RescaleSlope", "RescaleIntercept")),
    ):
        item = group_item(ds, name)
        for key in keys:
            if item is not None and key not in ds and key in item:
                setattr(ds, key, getattr(item, key))
    return ds


def shown(ds, stored):
    """8-bit RGB by pydicom's own look-up tables and windows."""
    kind = ds.PhotometricInterpretation
    if kind == "PALETTE COLOR":
        rgb = apply_color_lut(stored, ds)
        return (rgb >> 8 if rgb.dtype == np.uint16 else rgb).astype(np.uint8)
    if not kind.startswith("MONOCHROME"):
        return stored.astype(np.uint8)
    values = apply_modality_lut(stored, ds)
    bits = ds.get("BitsStored", 32)
    if "VOILUTSequence" in ds and ds.VOILUTSequence:
        item = ds.VOILUTSequence[0]
        share = apply_voi_lut(values, ds, prefer_lut=True).astype(float) / (2 ** item.LUTDescriptor[2] - 1)
    elif ds.get("WindowWidth") not in (None, "") and ds.get("WindowCenter") not in (None, ""):
        windowed = apply_voi_lut(values, ds).astype(float)
        # pydicom spreads the window over the range of possible values; its ends are found by windowing far values.
        far = np.array([-1e9, 1e9])
        low, high = apply_voi_lut(far, ds)
        share = (windowed - low) / (high - low)
    elif bits <= 8 and ds.get("PixelRepresentation", 0) == 0 and np.array_equal(values, stored):
        share = stored / (2**bits - 1)
    else:
        values = values.astype(float)
        low, high = np.nanmin(values), np.nanmax(values)
        share = (values - low) / ((high - low) or 1)
    gray = np.clip(np.floor(share * 255 + 0.5), 0, 255).astype(np.uint8)
    if kind == "MONOCHROME1":
        gray = 255 - gray
    return np.repeat(gray[..., None], 3, axis=-1)


def main(out, files):
    index = []
    for n, name in enumerate(files):
        try:
            ds = with_groups(pydicom.dcmread(name))
            frames = int(ds.get("NumberOfFrames", 1) or 1)
            # Of pydicom's decoders of JPEG baseline the one that is libjpeg-turbo; others upsample colours otherwise.
            baseline = ds.file_meta.TransferSyntaxUID == pydicom.uid.JPEGBaseline8Bit
            ds.pixel_array_options(raw=False, decoding_plugin="pillow" if baseline else "")
            stored = ds.pixel_array
            stored = stored[0] if frames > 1 else stored
            picture = shown(ds, stored)
            Path(out, f"{n}.stored").write_bytes(np.ascontiguousarray(stored, dtype="<f8").tobytes())
            Path(out, f"{n}.shown").write_bytes(np.ascontiguousarray(picture).tobytes())
            index.append({"file": name, "height": picture.shape[0], "width": picture.shape[1], "error": None})
        except Exception as error:
            index.append({"file": name, "error": f"{type(error).__name__}: {error}"})
    Path(out, "index.json").write_text(json.dumps({"pydicom": pydicom.__version__, "files": index}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
