"""What every part needs: configs, console, devices, files, figures."""
