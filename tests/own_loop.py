"""A loop as a scanner shows it: a cone of changing speckle, a banner with a name, a scale; and ways to write it."""

import imageio_ffmpeg
import numpy as np
from PIL import Image, ImageDraw
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, UltrasoundMultiFrameImageStorage, generate_uid

NAME = "Müller^Änne"


def cone(height=120, width=160):
    """bool [H, W]: the ultrasound sector of `loop`."""
    y, x = np.mgrid[:height, :width]
    y, x = y - 14, x - width / 2
    return (np.hypot(y, x) < 96) & (np.abs(x) < 0.7 * y)


def loop(frames=12, seed=0):
    """uint8 [F, 120, 160] and where the banner's letters are, bool [120, 160]."""
    generator = np.random.default_rng(seed)
    film = np.where(cone(), generator.integers(30, 220, (frames, 120, 160)), 0).astype(np.uint8)
    banner = Image.new("L", (160, 120))
    ImageDraw.Draw(banner).text((2, 1), "MULLER ANNE", fill=255)
    letters = np.asarray(banner) > 0
    film[:, letters] = 255
    film[:, 30:110:10, 150] = 200  # the depth scale
    return film, letters


def dicom(path, frames, region=(0, 0, 159, 119), delta=(0.03, 0.05), **changes):
    """Write frames, uint8 or uint16 [F, H, W] or [F, H, W, 3], as an ultrasound loop; delta (x, y) in cm per pixel."""
    d = Dataset()
    d.file_meta = FileMetaDataset()
    d.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    d.file_meta.MediaStorageSOPClassUID = d.SOPClassUID = UltrasoundMultiFrameImageStorage
    d.file_meta.MediaStorageSOPInstanceUID = d.SOPInstanceUID = generate_uid()
    d.SpecificCharacterSet, d.PatientName = "ISO_IR 192", NAME
    d.PatientID, d.InstitutionName = "4711-ID", "Klinik am See"
    d.private_block(0x0019, "SCANNER", create=True).add_new(0x10, "LO", "SECRET-PRIVATE")
    d.Modality, d.FrameTime, d.NumberOfFrames = "US", "25.0", len(frames)
    d.Rows, d.Columns = frames.shape[1:3]
    d.SamplesPerPixel = 3 if frames.ndim == 4 else 1
    d.PhotometricInterpretation = "RGB" if frames.ndim == 4 else "MONOCHROME2"
    d.BitsAllocated = d.BitsStored = 8 * frames.itemsize
    d.HighBit, d.PixelRepresentation = d.BitsStored - 1, 0
    if frames.ndim == 4:
        d.PlanarConfiguration = 0
    if region:
        r = Dataset()
        r.RegionSpatialFormat, r.RegionDataType, r.RegionFlags = 1, 1, 0
        r.RegionLocationMinX0, r.RegionLocationMinY0, r.RegionLocationMaxX1, r.RegionLocationMaxY1 = region
        r.PhysicalUnitsXDirection = r.PhysicalUnitsYDirection = 3
        r.PhysicalDeltaX, r.PhysicalDeltaY = delta
        d.SequenceOfUltrasoundRegions = [r]
    d.PixelData = np.ascontiguousarray(frames).tobytes()
    for name, value in changes.items():
        setattr(d, name, value)
    d.save_as(path, enforce_file_format=True)
    return path


def video(path, frames, fps=20, **options):
    """Write uint8 [F, H, W] with ffmpeg; lossless for .avi, H.264 of high quality for .mp4."""
    kind = {"codec": "ffv1", "quality": None, "pix_fmt_out": "gray"} if path.suffix == ".avi" else {"quality": 10}
    writer = imageio_ffmpeg.write_frames(str(path), frames.shape[:0:-1], pix_fmt_in="gray", fps=fps,
                                         macro_block_size=1, **{**kind, **options})
    writer.send(None)
    for frame in frames:
        writer.send(np.ascontiguousarray(frame))
    writer.close()
    return path


def pictures(folder, frames):
    """Write frame_1.png, frame_2.png, … frame_10.png …: names that do not sort as text."""
    folder.mkdir()
    for number, frame in enumerate(frames, 1):
        Image.fromarray(frame).save(folder / f"frame_{number}.png")
    return folder
