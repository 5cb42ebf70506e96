"""What every other part of the package uses: configs, console, devices, files, figures."""
