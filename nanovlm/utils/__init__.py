"""What the rest of the package uses: configs, console, devices, figures, files, processes."""
