"""The sub-commands of `vistok`, one file each."""
