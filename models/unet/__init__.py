"""The CNN baseline: MONAI's residual 3-D U-Net (after Kerfoot et al. 2019), 4.8 million parameters."""

DEFAULTS = {
    "in_channels": 4,
    "out_channels": 4,
    "channels": (16, 32, 64, 128, 256),
    "strides": (2, 2, 2, 2),
    "num_res_units": 2,
}
SIZE_MULTIPLE = 16  # four halvings


def build(**config):
    from monai.networks.nets import UNet

    return UNet(spatial_dims=3, **config)
