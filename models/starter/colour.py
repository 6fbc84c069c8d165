"""Colours: which are told apart, where they lie in CIELAB, and what they are called."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

# A few representative sRGB shades of each colour; a pixel belongs to the colour of the nearest ones.
SHADES: dict[str, tuple[str, ...]] = {
    "black": ("000000", "141414", "262626", "1c1e26"),
    "grey": ("4d4d4d", "808080", "a6a6a6", "c8c8c8", "6b7280", "9ca3af"),
    "white": ("ffffff", "f4f4f4", "e8e8ec"),
    "red": ("ff0000", "d21f2b", "b01020", "8b0000", "f03a3a", "dd2e44"),
    "orange": ("ff7f00", "ff9a2e", "e8751a", "f4900c", "d9651e"),
    "yellow": ("ffff00", "ffd83d", "f5c518", "ffcc4d", "fff176", "d4af37"),
    "green": ("00ff00", "2e9e3e", "006400", "77b255", "4caf50", "8bc34a", "556b2f", "2f6f4f"),
    "turquoise": ("00ced1", "40e0d0", "1abc9c", "00a6a6", "7fdbda"),
    "blue": ("0000ff", "1e60d0", "0a2a6b", "3b88c3", "55acee", "1f3d7a", "87ceeb", "2196f3"),
    "purple": ("800080", "9b30c8", "5b2a86", "aa8dd8", "744eaa", "7e57c2"),
    "pink": ("ff69b4", "ffb6c1", "f4a6c0", "ea596e", "ff1493", "f78fb3"),
    "brown": ("6b3e1f", "8b4513", "5d4037", "a0694a", "4a2c17", "c1694f"),
    "beige": ("f5deb3", "e8d3b0", "d2b48c", "e6d5c0", "f7dece"),
}
NAMES: dict[str, str] = {
    "black": "black noir noire noirs noires schwarz schwarze schwarzer schwarzes schwarzen negro negra negros negras",
    "grey": "grey gray silver gris grise grises argenté argentée grau graue grauer graues grauen silbern plateado "
    "plateada",
    "white": "white blanc blanche blancs blanches weiß weiße weißer weißes weißen blanco blanca blancos blancas",
    "red": "red crimson scarlet rouge rouges rot rote roter rotes roten rojo roja rojos rojas bordeaux burgundy",
    "orange": "orange oranges orangefarben naranja anaranjado anaranjada",
    "yellow": "yellow gold golden jaune jaunes doré dorée gelb gelbe gelber gelbes gelben amarillo amarilla amarillos "
    "amarillas dorado dorada",
    "green": "green olive vert verte verts vertes grün grüne grüner grünes grünen verde verdes",
    "turquoise": "turquoise teal cyan turquesa türkis",
    "blue": "blue navy bleu bleue bleus bleues blau blaue blauer blaues blauen azul azules marineblau",
    "purple": "purple violet mauve lilac violette violets violettes lila morado morada púrpura violett lilas",
    "pink": "pink rose roses rosa fuchsia",
    "brown": "brown marron brun brune bruns brunes braun braune brauner braunes braunen marrón marrones castaño",
    "beige": "beige tan cream crème beiges",
}
COLOURS = tuple(SHADES)


def prototypes() -> tuple[Array, Array]:
    """Shades in CIELAB [S, 3] and the matrix [S, colours] saying which colour each one is."""
    shades = [(shade, index) for index, colour in enumerate(COLOURS) for shade in SHADES[colour]]
    rgb = np.array([[int(shade[i : i + 2], 16) for i in (0, 2, 4)] for shade, _ in shades], np.float32)
    members = np.zeros((len(shades), len(COLOURS)), np.float32)
    members[np.arange(len(shades)), [index for _, index in shades]] = 1.0
    return to_lab(rgb / 255.0), members


def to_lab(rgb: Array) -> Array:
    """sRGB in 0..1 → CIELAB (D65), last axis."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((np.maximum(rgb, 0) + 0.055) / 1.055) ** 2.4)
    xyz = linear @ RGB_TO_XYZ.T
    root = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    light, a, b = 116 * root[..., 1] - 16, 500 * (root[..., 0] - root[..., 1]), 200 * (root[..., 1] - root[..., 2])
    return np.stack([light, a, b], axis=-1).astype(np.float32)


# Rows already divided by the D65 white point.
RGB_TO_XYZ: Array = (
    np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]], np.float32)
    / np.array([[0.95047], [1.0], [1.08883]], np.float32)
).astype(np.float32)
