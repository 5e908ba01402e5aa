"""What blocked training is compared with."""
