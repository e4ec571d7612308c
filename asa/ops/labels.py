"""Class indices of label maps."""

IGNORED = 255  # index of voxels that count neither in a loss nor in a score
